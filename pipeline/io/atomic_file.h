#pragma once
/// Files that exist whole or not at all: written to a temporary name in the same directory, synced,
/// renamed, the directory synced. What is not committed is removed by the destructor.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>

namespace espalier::io {

class AtomicFile {
 public:
  /// Creates missing parent directories. Throws EnvironmentError (path, errno text, free bytes).
  explicit AtomicFile(std::filesystem::path target);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(const std::string& text);
  /// The temporary name, for libraries that open by name (HDF5).
  const std::filesystem::path& temporary() const { return temporary_; }
  const std::filesystem::path& target() const { return target_; }
  /// Sync, rename, sync the directory.
  void commit();

 private:
  std::filesystem::path target_, temporary_;
  int descriptor_ = -1;
  bool committed_ = false;
};

void write_file(const std::filesystem::path& target, const std::string& text);
/// Throws UserError naming the file when it is missing, no regular file or above the limit.
std::string read_file(const std::filesystem::path& file, size_t limit_bytes = size_t{1} << 30);
/// Copies the content, in pieces; the copy appears whole. Replaces what stands there.
void copy_whole(const std::filesystem::path& source, const std::filesystem::path& target);
/// Whether the name is one that AtomicFile gives to a file it has not committed.
bool is_temporary(const std::filesystem::path& file);
/// Removes temporary files that a killed process of this run left under `directory`.
void remove_leftovers(const std::filesystem::path& directory);
/// Throws EnvironmentError with both numbers when fewer than `needed_bytes` are free, or the
/// directory cannot be created or written. Leaves nothing behind: a run that is refused later has
/// made no directory.
void require_space(const std::filesystem::path& directory, int64_t needed_bytes);
/// An EnvironmentError about `file`: "ACTION: REASON; N bytes are free on its file system; ...".
[[noreturn]] void throw_environment_error(const std::filesystem::path& file,
                                          const std::string& action, const std::string& reason);
/// The same with the text of `error_number`.
[[noreturn]] void throw_environment_error(const std::filesystem::path& file,
                                          const std::string& action, int error_number);

}  // namespace espalier::io
