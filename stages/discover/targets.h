#pragma once
/// The matrices that `discover.targets` names.

#include <cstdint>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"

namespace espalier::discover {

struct TargetMatrix {
  std::string name;  ///< of the layer's weight, [rows, columns]
  int64_t rows = 0, columns = 0;
  int64_t block = 0;
  model::Linear layer;
};

/// The weights of the blocks' linear layers that any glob matches, in the order of the blocks. A
/// glob is held against the last part of a layer's name ("q_proj"), its name in the block
/// ("self_attn.*") and its whole name ("model.layers.0.*"). Throws UserError listing the layers
/// when a glob matches none.
std::vector<TargetMatrix> target_matrices(const model::Architecture& architecture,
                                          const std::vector<std::string>& globs);

}  // namespace espalier::discover
