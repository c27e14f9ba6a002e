#pragma once
/// What `--plan` says of retraining: the matrices and other tensors that a method trains, and how
/// many numbers these are.

#include <string>

#include "pipeline/driver/stage.h"
#include "stages/retrain/selection.h"

namespace espalier::retrain {

/// `head`: parameters of a classification head. Where the method's paper counts the trainable ones
/// in another way, its number stands beside.
driver::StagePlan plan_of(const Selection& selection, const model::Architecture& architecture,
                          const std::string& method_name, const AdapterMethod& method,
                          int64_t head);

/// Numbers that will be trained, without a head's.
int64_t trainable_parameters(const Selection& selection, const AdapterMethod& method);

}  // namespace espalier::retrain
