#pragma once
/// Random values at the start of a training: a function of (seed, purpose, name, index) alone.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace espalier::retrain {

/// float32, uniform in [-bound, bound).
at::Tensor uniform_start(uint64_t seed, std::string_view purpose, std::string_view name,
                         at::IntArrayRef shape, double bound);

/// float32, normal with mean 0.
at::Tensor normal_start(uint64_t seed, std::string_view purpose, std::string_view name,
                        at::IntArrayRef shape, double deviation);

}  // namespace espalier::retrain
