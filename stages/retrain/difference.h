#pragma once
/// How far the model that was written is from the one that was trained: what merging and rounding
/// changed.

#include <filesystem>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/retrain/adapted_model.h"

namespace espalier::retrain {

struct Difference {
  double largest_logit = 0;  ///< largest |difference| of any logit
  double mean_kl = 0;        ///< KL(trained || written) a position, nats; 0 for a regression
  int64_t positions = 0;     ///< tokens, or sequences of a head
};

/// Runs `batches` (the units) through `model` unmerged and through the files in `written`, and
/// compares the logits, float32 to float64 sums in the order of the units. The written model is
/// streamed block by block. Collective.
Difference difference_to_written(const AdaptedModel& model, const std::filesystem::path& written,
                                 const std::vector<UnitBatch>& batches, uint64_t seed,
                                 Workers& workers, const comm::Communicator& group);

}  // namespace espalier::retrain
