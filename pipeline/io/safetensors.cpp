#include "pipeline/io/safetensors.h"

#include <ATen/Functions.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>

#include "pipeline/errors.h"
#include "pipeline/io/safetensors_header.h"

namespace espalier::io {

int64_t TensorInfo::elements() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

struct SafetensorsFile::Mapping {
  std::filesystem::path path;
  std::string identity;
  SafetensorsHeader header;
  char* start = nullptr;
  int64_t bytes = 0;

  explicit Mapping(const std::filesystem::path& file);
  ~Mapping() {
    if (start != nullptr) ::munmap(start, static_cast<size_t>(bytes));
  }
  const TensorInfo& info(const std::string& name) const;

 private:
  void map();
};

SafetensorsFile::Mapping::Mapping(const std::filesystem::path& file) : path(file) {
  map();
  try {
    header = parse_safetensors_header(start, bytes, path.string());
  } catch (...) {
    if (start != nullptr) ::munmap(start, static_cast<size_t>(bytes));
    throw;
  }
}

void SafetensorsFile::Mapping::map() {
  // Without O_NONBLOCK a named pipe would wait for a writer before it can be refused.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) {
    throw UserError(fmt::format("{}: cannot be opened: {}", path.string(), std::strerror(errno)));
  }
  struct stat status {};
  if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw UserError(fmt::format("{}: is not a regular file", path.string()));
  }
  bytes = status.st_size;
  identity = fmt::format("{}:{}:{}:{}.{}", status.st_dev, status.st_ino, status.st_size,
                         status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
  void* mapped = nullptr;
  if (bytes > 0) {
    mapped = ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ, MAP_PRIVATE, descriptor, 0);
  }
  const int error_number = errno;
  ::close(descriptor);
  if (mapped == MAP_FAILED) {
    throw EnvironmentError(
        fmt::format("{}: its {} bytes cannot be mapped: {}; raise the limit on "
                    "address space (ulimit -v)",
                    path.string(), bytes, std::strerror(error_number)));
  }
  start = static_cast<char*>(mapped);
}

const TensorInfo& SafetensorsFile::Mapping::info(const std::string& name) const {
  const auto found = header.tensors.find(name);
  if (found == header.tensors.end()) {
    throw UserError(fmt::format("{}: has no tensor \"{}\"", path.string(), name));
  }
  return found->second;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& file)
    : mapping_(std::make_shared<Mapping>(file)) {}

const std::map<std::string, TensorInfo>& SafetensorsFile::tensors() const {
  return mapping_->header.tensors;
}

const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return mapping_->header.metadata;
}

const std::filesystem::path& SafetensorsFile::path() const { return mapping_->path; }

const std::string& SafetensorsFile::identity() const { return mapping_->identity; }

at::Tensor SafetensorsFile::view(const std::string& name) const {
  const TensorInfo& info = mapping_->info(name);
  char* data = mapping_->start + info.begin;
  const auto options = at::TensorOptions().dtype(info.dtype);
  if (info.bytes() == 0) return at::empty(info.shape, options);
  // The format promises no alignment, and vector loads want that of the element at least.
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(info.dtype) != 0) {
    at::Tensor copy = at::empty(info.shape, options);
    std::memcpy(copy.mutable_data_ptr(), data, static_cast<size_t>(info.bytes()));
    return copy;
  }
  return at::from_blob(
      data, info.shape, [mapping = mapping_](void*) {}, options);
}

void SafetensorsFile::drop(const std::string& name) const {
  const TensorInfo& info = mapping_->info(name);
  if (info.bytes() == 0) return;
  // Outwards: one fault maps all cached pages around it (Linux: an aligned window of 64 KiB), also
  // those of neighbours that were dropped before; they would stay for ever. What is still needed is
  // read again from the file.
  constexpr int64_t kFaultWindow = 64 << 10;
  const int64_t window = std::max<int64_t>(kFaultWindow, ::sysconf(_SC_PAGESIZE));
  const int64_t begin = info.begin / window * window;
  const int64_t end = std::min((info.end + window - 1) / window * window, mapping_->bytes);
  ::madvise(mapping_->start + begin, static_cast<size_t>(end - begin), MADV_DONTNEED);
}

}  // namespace espalier::io
