#pragma once
/// The hidden states of a rank's calibration units between two blocks: in memory, or in a file when
/// they would take the rank above cluster.memory_gib.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

namespace espalier::prune {

/// What a rank is predicted to hold at its peak while it prunes.
struct MemoryNeed {
  int64_t hidden_states = 0;  ///< bytes of all its units
  int64_t others = 0;         ///< bytes of the block, its statistics and what one unit needs
};

/// True when the hidden states have to go to disk: a limit is set (bytes; 0: none) and all together
/// is above it. Only memory depends on it, never a bit of the results.
bool must_spill(const MemoryNeed& need, int64_t limit);

class HiddenStates {
 public:
  explicit HiddenStates(int64_t units);
  ~HiddenStates();
  HiddenStates(const HiddenStates&) = delete;
  HiddenStates& operator=(const HiddenStates&) = delete;

  /// Keeps units of at most `unit_bytes` in one file of this rank under `directory` from now on.
  /// The file has no name once it is open, so nothing is left of it however the process ends.
  /// Throws EnvironmentError naming the directory when it cannot be written or lacks the space.
  void spill_to(const std::filesystem::path& directory, int64_t unit_bytes);
  /// Bytes the file has room for; 0 in memory.
  int64_t spilled_bytes() const;

  int64_t units() const { return static_cast<int64_t>(kept_.size()); }
  /// What was put last. Distinct units may be read and written by several workers at a time.
  at::Tensor get(int64_t unit) const;
  void put(int64_t unit, const at::Tensor& states);

 private:
  struct File;
  std::vector<at::Tensor>
      kept_;  ///< the states; of a spilled unit shape and type alone (no storage)
  std::unique_ptr<File> file_;
};

}  // namespace espalier::prune
