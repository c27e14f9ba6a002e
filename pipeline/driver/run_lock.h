#pragma once
/// One start at a time in a run's directory: the file run.lock says who has it.
///
///   {"host", "boot", "namespace", "process", "started", "job", "restart", "time"}
///
/// The owner sets the file's modification time every few seconds. A lock is stale when its process
/// is gone, where that can be seen (the same boot of the same host), or when its Slurm job is ours
/// and was requeued since; and else when no sign of life came for Timing::silence and, watched for
/// two beats, none comes: modification times are the file server's, so that neither clocks that
/// differ between hosts nor one that jumps matter.

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>

namespace espalier::driver {

class RunLock {
 public:
  struct Timing {
    std::chrono::milliseconds beat{10'000};
    std::chrono::milliseconds silence{120'000};
  };

  /// By one rank. Takes the lock of `directory`, a stale one too. Throws EnvironmentError naming
  /// owner, host and age when another start has it, or when it cannot be made.
  explicit RunLock(const std::filesystem::path& directory) : RunLock(directory, Timing{}) {}
  RunLock(const std::filesystem::path& directory, Timing timing);
  /// Gives it back.
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  /// Sets the time until asked to stop. Finding another's lock, as after a stop of hours, it ends
  /// the process: two would write.
  void beat(const std::stop_token& stop) const;

  std::filesystem::path file_;
  Timing timing_;
  std::string content_;
  std::jthread heart_;
};

struct LockOwner {
  std::string text;     ///< "process 12 on node1 (job 7) since ..., last seen 4 s ago"
  bool gone = false;    ///< where that can be seen
  bool silent = false;  ///< no sign of life came for Timing::silence
};

/// nullopt when nobody has the directory. Never fails because of the file's content.
std::optional<LockOwner> owner_of(const std::filesystem::path& directory);

}  // namespace espalier::driver
