#pragma once
/// The one place that turns tensors of a checkpoint into the layers of a block, weights [out, in]
/// and biases [out], and back: families store q, k and v in one tensor, or weights transposed
/// (Stored in architecture.h). Everything else, pruning, training, masks, adapters, knows layers by
/// Architecture::weight_name and bias_name and never sees how they are stored.

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"

namespace espalier::model {

/// The checkpoint's tensors that hold the layer, and the weight's shape there (`linear` as
/// Architecture::in_block gives it).
std::string stored_weight_name(const Architecture& architecture, int64_t block,
                               const Linear& linear);
std::string stored_bias_name(const Architecture& architecture, int64_t block, const Linear& linear);
std::vector<int64_t> stored_weight_shape(const Linear& linear);

/// The layer's weight [out, in] or bias [out] out of the stored tensor; a view where strides can
/// say it, and the tensor itself where the layer is stored plainly. `linear`: as in_block gives it.
at::Tensor layer_part(const Architecture& architecture, const Linear& linear,
                      const at::Tensor& stored);

/// Names under which the checkpoint stores a tied head once more, with the same values: other
/// programs tie by comparing, so what changes the embedding changes them too. Reads tensors of the
/// embedding's shape, once a process.
std::vector<std::string> copies_of_tied_head(const Architecture& architecture,
                                             const io::Checkpoint& checkpoint);

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Tensors by their layers' names, as the checkpoint stores them: what is kept plainly (and every
/// name that is no layer's) passes as it is; what is kept transposed is turned; parts of one tensor
/// are joined, and the parts that are not among `layers` keep `base`'s values, in the type of the
/// given ones (all are given where `base` has another number of heads). A tied embedding is given
/// to its copies in `base` too. The order is that of the first part of each. Costs a copy of the
/// joined tensors.
NamedTensors stored_tensors(const Architecture& architecture, const io::Checkpoint& base,
                            const NamedTensors& layers);

}  // namespace espalier::model
