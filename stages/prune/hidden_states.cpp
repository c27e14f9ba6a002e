#include "stages/prune/hidden_states.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::prune {

struct HiddenStates::File {
  std::filesystem::path path;
  int descriptor;
  int64_t unit_bytes;

  File(const std::filesystem::path& directory, int64_t unit_bytes)
      : path(directory / "hidden-states-XXXXXX"), unit_bytes(unit_bytes) {
    std::string name = path.string();
    descriptor = ::mkostemp(name.data(), O_CLOEXEC);
    if (descriptor < 0) io::throw_environment_error(path, "cannot be created", errno);
    ::unlink(name.c_str());
  }
  ~File() { ::close(descriptor); }

  /// Calls once(bytes moved so far) until all `bytes` of the unit are moved.
  template <typename Once>
  void move(const char* what, int64_t bytes, Once once) const {
    for (int64_t moved = 0; moved < bytes;) {
      const ssize_t count = once(moved);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0)
        io::throw_environment_error(path, fmt::format("hidden states cannot be {}", what),
                                    count < 0 ? errno : EIO);
      moved += count;
    }
  }
};

bool must_spill(const MemoryNeed& need, int64_t limit) {
  return limit > 0 && need.hidden_states > limit - need.others;
}

HiddenStates::HiddenStates(int64_t units) : kept_(static_cast<size_t>(units)) {}
HiddenStates::~HiddenStates() = default;

void HiddenStates::spill_to(const std::filesystem::path& directory, int64_t unit_bytes) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  io::require_space(directory, units() * unit_bytes);
  file_ = std::make_unique<File>(directory, unit_bytes);
}

int64_t HiddenStates::spilled_bytes() const { return file_ ? units() * file_->unit_bytes : 0; }

at::Tensor HiddenStates::get(int64_t unit) const {
  const at::Tensor& kept = kept_.at(static_cast<size_t>(unit));
  if (!file_) return kept;
  at::Tensor states = at::empty(kept.sizes(), kept.options().device(at::kCPU));
  const auto bytes = static_cast<int64_t>(states.nbytes());
  auto* to = static_cast<char*>(states.data_ptr());
  file_->move("read", bytes, [&](int64_t done) {
    return ::pread(file_->descriptor, to + done, static_cast<size_t>(bytes - done),
                   unit * file_->unit_bytes + done);
  });
  return states;
}

void HiddenStates::put(int64_t unit, const at::Tensor& states) {
  at::Tensor& kept = kept_.at(static_cast<size_t>(unit));
  if (!file_) {
    kept = states;
    return;
  }
  const at::Tensor whole = states.contiguous();
  const auto bytes = static_cast<int64_t>(whole.nbytes());
  if (bytes > file_->unit_bytes)
    throw DefectError(
        fmt::format("hidden states of {} bytes for a place of {}", bytes, file_->unit_bytes));
  const auto* from = static_cast<const char*>(whole.const_data_ptr());
  file_->move("written", bytes, [&](int64_t done) {
    return ::pwrite(file_->descriptor, from + done, static_cast<size_t>(bytes - done),
                    unit * file_->unit_bytes + done);
  });
  kept = at::empty(whole.sizes(), whole.options().device(at::kMeta));
}

}  // namespace espalier::prune
