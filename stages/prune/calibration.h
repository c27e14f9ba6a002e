#pragma once
/// Calibration: the hidden states of this rank's units between two blocks, and the statistics of a
/// block's distinct inputs, summed exactly over all units of all ranks (design.md, section 4).

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/comm/exact_sum.h"
#include "pipeline/driver/stage.h"
#include "pipeline/model/block.h"
#include "stages/prune/hidden_states.h"
#include "stages/prune/options.h"

namespace espalier::prune {

/// What a method needs of one distinct input, over all calibration tokens.
struct InputStatistics {
  at::Tensor gram;           ///< SparseGPT: float64 [n, n], sum X^T X; undefined for Wanda
  std::vector<float> norms;  ///< Wanda: sqrt of the mean over sequences of sum x_j^2, [n]
};

class Calibration {
 public:
  /// Draws this rank's units (unit u belongs to rank u % ranks) and embeds them. Memory: samples /
  /// ranks * sequence_length * hidden elements of the products' type; in a file under
  /// `spill_directory` when that would go beyond run.memory_bytes.
  Calibration(const driver::RunContext& run, const Options& options,
              const model::Architecture& architecture, const io::Checkpoint& checkpoint,
              const std::filesystem::path& spill_directory);
  /// Of this rank's hidden states; 0 when they are in memory.
  int64_t spilled_bytes() const { return hidden_states_.spilled_bytes(); }

  /// One pass of every unit through `block` up to the down projection, which is not needed. By
  /// Input; inputs that no chosen layer reads stay empty. Collective. Throws NumericalError naming
  /// block and input when an activation is not finite. `say` hears of a repetition on a coarser
  /// grid.
  std::array<InputStatistics, model::kInputs> collect(
      const model::BlockWeights& block, int64_t index,
      const std::vector<const model::Linear*>& layers,
      const std::function<void(const std::string&)>& say);

  /// Sends every unit through `block`: the hidden states become the next block's inputs.
  void advance(const model::BlockWeights& block);

 private:
  struct Collector;
  MemoryNeed memory_need() const;
  int64_t unit_bytes() const;
  int64_t owned() const { return hidden_states_.units(); }
  int64_t sequences_of(int64_t owned_unit) const;
  model::UnitShape shape_of(int64_t owned_unit) const;

  const driver::RunContext& run_;
  const Options& options_;
  const model::Architecture& architecture_;
  model::RotaryTable rotary_;
  HiddenStates hidden_states_;  ///< of owned unit i = global unit rank + i * ranks
};

}  // namespace espalier::prune
