#pragma once
/// Calibration: the hidden states of this rank's units between two blocks, and the statistics of a
/// block's distinct inputs, summed exactly over all units of all ranks (design.md, section 4).

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/comm/exact_sum.h"
#include "pipeline/driver/stage.h"
#include "pipeline/model/block.h"
#include "stages/prune/hidden_states.h"
#include "stages/prune/options.h"
#include "stages/prune/statistics.h"

namespace espalier::prune {

class Calibration {
 public:
  /// `needs`: what collect() is to give. Draws this rank's units (unit u belongs to rank u % ranks)
  /// and embeds them. Memory: samples / ranks * sequence_length * hidden elements of the products'
  /// type; in a file under `spill_directory` when that would go beyond run.memory_bytes. UserError
  /// when prune.tokens=loss_mask counts no token of any sequence.
  Calibration(const driver::RunContext& run, const Options& options,
              const model::Architecture& architecture, const io::Checkpoint& checkpoint,
              const Needs& needs, const std::filesystem::path& spill_directory);
  /// Of this rank's hidden states; 0 when they are in memory.
  int64_t spilled_bytes() const { return hidden_states_.spilled_bytes(); }

  /// One pass of every unit through `block` up to the down projection, which is not needed. By
  /// Input; inputs that no layer of `layers` reads stay empty. Only counted tokens weigh
  /// (prune.tokens). Collective. Throws NumericalError naming block and input when an activation is
  /// not finite. `say` hears of a repetition on a coarser grid.
  std::array<InputStatistics, model::kInputs> collect(
      const model::BlockWeights& block, int64_t index, const std::vector<PlannedLayer>& layers,
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
  Needs needs_;
  model::RotaryTable rotary_;
  HiddenStates hidden_states_;       ///< of owned unit i = global unit rank + i * ranks
  std::vector<at::Tensor> counted_;  ///< bool [tokens] of each; undefined: every token
  int64_t counted_tokens_ = 0;       ///< of all ranks
};

}  // namespace espalier::prune
