#pragma once
/// The way of every measurement through a model: units of a fixed composition, spread over ranks
/// and workers, pass through the blocks one after another, and each is scored at the end.

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/block.h"

namespace espalier::evaluate {

struct UnitInput {
  at::Tensor tokens;  ///< int64 [rows of the unit]
  model::UnitShape shape;
};

struct UnitWork {
  std::string what;         ///< for the progress line: "segments"
  int64_t units = 0;        ///< how many
  int64_t unit_tokens = 0;  ///< of the largest, padding included
  /// The unit's input. Called twice.
  std::function<UnitInput(int64_t unit)> input;
  /// Its scores, as many as the unit has, from the hidden states behind the final norm.
  std::function<std::vector<double>(int64_t unit, const UnitInput& input,
                                    const at::Tensor& hidden_states, const model::Ends& ends)>
      score;
};

/// The scores of every unit, by unit, on every rank. Blocks are streamed, with the hidden states of
/// at most 256 MB of units a rank at a time (less under cluster.memory_gib). Collective. Throws
/// Requeue when the run is to stop.
std::vector<std::vector<double>> score_units(driver::StageContext& context,
                                             const io::Checkpoint& checkpoint,
                                             const model::Architecture& architecture,
                                             const UnitWork& work);

}  // namespace espalier::evaluate
