#pragma once
/// What every rank needs whole of a distinct input (a factor, an eigendecomposition): computed
/// once, by one worker of one rank, and broadcast.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"

namespace espalier::prune {

struct Computed {
  std::vector<at::Tensor> tensors;  ///< float32, contiguous
  nlohmann::json report;
};

/// compute(input) for every input whose `sizes` entry is not 0, by index; the others stay empty.
/// Longest first onto the rank with the least work, by the cube of the size; a rank's workers share
/// its inputs. Collective: two broadcasts an input and one a tensor.
std::vector<Computed> once_per_input(std::span<const int64_t> sizes, Workers& workers,
                                     const comm::Communicator& group,
                                     const std::function<Computed(int64_t input)>& compute);

}  // namespace espalier::prune
