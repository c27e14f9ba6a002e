#pragma once
/// What `--plan` says of pruning: every linear layer of the model with the pattern that it gets.

#include <optional>
#include <string>

#include "pipeline/driver/stage.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/method.h"
#include "stages/prune/options.h"

namespace espalier::prune {

/// Said where both are asked for: no statistics are collected of the pooling layer's input.
inline constexpr const char* kPoolerStays =
    "refine and refit work on the blocks: the pooling layer keeps the method's mask and weights";

/// Zeros are those of matrices without any: with keep_zeros, those of a sparse model stay and
/// count. "-" where only the data says how many go. `pooler`: the weight of the model's pooling
/// layer where the method prunes it (PruningMethod::prunes_pooler).
driver::StagePlan plan_of(const std::string& method_name, const PruningMethod& method,
                          const Options& options, const model::Architecture& architecture,
                          const std::optional<std::string>& pooler);

}  // namespace espalier::prune
