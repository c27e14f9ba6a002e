#include "pipeline/io/atomic_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

constexpr std::string_view kMark = ".espalier-tmp-";
constexpr std::string_view kPlaceholder = "XXXXXX";  // what mkstemp fills in

/// Free bytes on the file system of the nearest ancestor that exists; -1 when none answers.
int64_t free_bytes(std::filesystem::path path) {
  path = std::filesystem::absolute(path);
  struct statvfs status {};
  while (::statvfs(path.c_str(), &status) != 0) {
    if (path == path.root_path()) return -1;
    path = path.parent_path();
  }
  return static_cast<int64_t>(status.f_bavail) * static_cast<int64_t>(status.f_frsize);
}

std::filesystem::path directory_of(const std::filesystem::path& file) {
  return file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
}

/// How often a directory or a file in it is made anew when what is above it goes meanwhile: another
/// start takes back what it made to see whether it can.
constexpr int kTries = 100;

void make_directory(const std::filesystem::path& directory) {
  std::error_code error;
  for (int tries = 0; tries < kTries; ++tries) {
    std::filesystem::create_directories(directory, error);
    if (error != std::errc::no_such_file_or_directory && error != std::errc::file_exists) break;
  }
  if (error) throw_environment_error(directory, "the directory cannot be created", error.value());
}

void sync_directory(const std::filesystem::path& directory) {
  const int descriptor = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) throw_environment_error(directory, "cannot be opened", errno);
  const int result = ::fsync(descriptor);
  const int error_number = errno;
  ::close(descriptor);
  // Some network file systems do not sync directories; their rename is as durable as they make it.
  if (result != 0 && error_number != EINVAL && error_number != ENOTSUP) {
    throw_environment_error(directory, "cannot be synced", error_number);
  }
}

void set_ordinary_permissions(int descriptor) {
  const mode_t mask = ::umask(0);
  ::umask(mask);
  ::fchmod(descriptor, 0666 & ~mask);
}

/// The open file, for reading; throws UserError.
int open_to_read(const std::filesystem::path& file, int64_t* size) {
  // Without O_NONBLOCK a named pipe would wait for a writer before it can be refused.
  const int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) {
    throw UserError(fmt::format("{}: cannot be opened: {}", file.string(), std::strerror(errno)));
  }
  struct stat status {};
  if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw UserError(fmt::format("{}: is not a regular file", file.string()));
  }
  *size = status.st_size;
  return descriptor;
}

/// Calls take(piece) until the end of the file.
template <typename Take>
void read_pieces(const std::filesystem::path& file, int descriptor, Take take) {
  std::vector<std::byte> piece(size_t{1} << 20);
  while (true) {
    const ssize_t count = ::read(descriptor, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      throw UserError(fmt::format("{}: cannot be read: {}", file.string(), std::strerror(errno)));
    }
    if (count == 0) return;
    take(std::span<const std::byte>(piece.data(), static_cast<size_t>(count)));
  }
}

struct Closing {
  int descriptor;
  ~Closing() { ::close(descriptor); }
};

}  // namespace

void throw_environment_error(const std::filesystem::path& file, const std::string& action,
                             const std::string& reason) {
  throw EnvironmentError(
      fmt::format("{}: {}: {}; {} bytes are free on its file system; free space, mend the "
                  "permissions, or choose another directory (run.dir, export.directory; a shorter "
                  "run.name and fewer overrides make a sweep's names shorter)",
                  file.string(), action, reason, free_bytes(file)));
}

void throw_environment_error(const std::filesystem::path& file, const std::string& action,
                             int error_number) {
  throw_environment_error(file, action,
                          fmt::format("{} (errno {})", std::strerror(error_number), error_number));
}

AtomicFile::AtomicFile(std::filesystem::path target) : target_(std::move(target)) {
  const std::filesystem::path directory = directory_of(target_);
  // File names end at 255 bytes: a long one is clipped to leave room for the mark.
  const std::string clipped = target_.filename().string().substr(0, 200);
  std::string name;
  for (int tries = 0; tries < kTries; ++tries) {
    make_directory(directory);
    name = (directory / fmt::format(".{}{}{}", clipped, kMark, kPlaceholder)).string();
    descriptor_ = ::mkostemp(name.data(), O_CLOEXEC);
    if (descriptor_ >= 0 || errno != ENOENT) break;
  }
  if (descriptor_ < 0) throw_environment_error(target_, "cannot be created", errno);
  temporary_ = name;
  set_ordinary_permissions(descriptor_);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_environment_error(target_, "cannot be written", errno);
    bytes = bytes.subspan(static_cast<size_t>(count));
  }
}

void AtomicFile::write(const std::string& text) {
  write(std::as_bytes(std::span<const char>(text.data(), text.size())));
}

void AtomicFile::commit() {
  if (descriptor_ < 0) throw DefectError(target_.string() + ": committed twice");
  if (::fsync(descriptor_) != 0) throw_environment_error(target_, "cannot be synced", errno);
  const int descriptor = std::exchange(descriptor_, -1);
  if (::close(descriptor) != 0) throw_environment_error(target_, "cannot be closed", errno);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    throw_environment_error(target_, "cannot be replaced", errno);
  }
  committed_ = true;
  sync_directory(directory_of(target_));
}

void write_file(const std::filesystem::path& target, const std::string& text) {
  AtomicFile file(target);
  file.write(text);
  file.commit();
}

std::string read_file(const std::filesystem::path& file, size_t limit_bytes) {
  int64_t size = 0;
  const Closing closing{open_to_read(file, &size)};
  std::string text;
  const auto refuse_above_limit = [&](size_t bytes) {
    if (bytes > limit_bytes) {
      throw UserError(fmt::format("{}: has {} bytes, more than the {} that are read of such a file",
                                  file.string(), bytes, limit_bytes));
    }
  };
  refuse_above_limit(static_cast<size_t>(size));
  text.reserve(static_cast<size_t>(size));
  read_pieces(file, closing.descriptor, [&](std::span<const std::byte> piece) {
    refuse_above_limit(text.size() + piece.size());
    text.append(reinterpret_cast<const char*>(piece.data()), piece.size());
  });
  return text;
}

void copy_whole(const std::filesystem::path& source, const std::filesystem::path& target) {
  int64_t size = 0;
  const Closing closing{open_to_read(source, &size)};
  AtomicFile copy(target);
  read_pieces(source, closing.descriptor,
              [&](std::span<const std::byte> piece) { copy.write(piece); });
  copy.commit();
}

bool is_temporary(const std::filesystem::path& file) {
  const std::string name = file.filename().string();
  const size_t tail = kMark.size() + kPlaceholder.size();
  return name.size() > tail && name.front() == '.' &&
         name.compare(name.size() - tail, kMark.size(), kMark) == 0;
}

void remove_leftovers(const std::filesystem::path& directory) {
  std::error_code error;
  std::vector<std::filesystem::path> leftovers;
  std::filesystem::recursive_directory_iterator entry(directory, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    if (is_temporary(entry->path()) && entry->is_regular_file()) leftovers.push_back(entry->path());
  }
  for (const auto& file : leftovers) {
    if (::unlink(file.c_str()) != 0 && errno != ENOENT) {
      throw_environment_error(file, "the leftover cannot be removed", errno);
    }
  }
}

namespace {

/// Takes back, when it ends, the directories that were made below what was there.
class TrialDirectory {
 public:
  explicit TrialDirectory(const std::filesystem::path& directory) {
    std::error_code error;
    for (auto path = std::filesystem::absolute(directory).lexically_normal();
         !std::filesystem::exists(path, error) && path.has_relative_path();
         path = path.parent_path())
      made_.push_back(path);
    make_directory(directory);
  }
  ~TrialDirectory() {
    std::error_code error;  // a directory that someone else uses by now stays
    for (const auto& path : made_) std::filesystem::remove(path, error);
  }
  TrialDirectory(const TrialDirectory&) = delete;
  TrialDirectory& operator=(const TrialDirectory&) = delete;

 private:
  std::vector<std::filesystem::path> made_;  ///< deepest first
};

}  // namespace

void require_space(const std::filesystem::path& directory, int64_t needed_bytes) {
  const TrialDirectory trial(directory);
  { const AtomicFile probe(directory / "probe"); }
  const int64_t free = free_bytes(directory);
  if (free >= 0 && free < needed_bytes) {
    throw EnvironmentError(
        fmt::format("{}: {} bytes are needed and {} are free; free space or choose another run.dir",
                    directory.string(), needed_bytes, free));
  }
}

}  // namespace espalier::io
