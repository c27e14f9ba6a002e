#pragma once
/// What `--plan` says of pruning: every linear layer of the model with the pattern that it gets.

#include <string>

#include "pipeline/driver/stage.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/method.h"
#include "stages/prune/options.h"

namespace espalier::prune {

/// Zeros are those of matrices without any: with keep_zeros, those of a sparse model stay and
/// count. "-" where only the data says how many go.
driver::StagePlan plan_of(const std::string& method_name, const PruningMethod& method,
                          const Options& options, const model::Architecture& architecture);

}  // namespace espalier::prune
