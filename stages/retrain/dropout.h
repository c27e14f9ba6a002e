#pragma once
/// Dropout whose mask is a function of (seed, step, sequence, layer) alone.

#include <ATen/core/Tensor.h>

#include <string_view>

#include "stages/retrain/adapter.h"

namespace espalier::retrain {

/// x [sequences * length, width] with each element zeroed with `probability` and the others divided
/// by 1 - probability. Dropped elements are found by their geometrically distributed gaps: one
/// random number a dropped element, not one an element. Linear, and its own transpose: the same
/// call gives the gradient. x itself where key.evaluating.
at::Tensor dropout(const at::Tensor& x, double probability, const UnitKey& key,
                   std::string_view layer);

}  // namespace espalier::retrain
