#pragma once
/// What stays beside a frozen matrix when an adapter is not merged into it.

#include <ATen/core/Tensor.h>

namespace espalier::model {

/// y = x W^T + scale (x down^T) up^T + x S^T + bias, S being zero but at `positions`. Every part
/// may be undefined (down and up together, positions and values together).
struct AddedTerms {
  at::Tensor down;       ///< float32 [r, in]
  at::Tensor up;         ///< float32 [out, r]
  double scale = 1;      ///< of the product alone, not of S
  at::Tensor positions;  ///< int64 [c], row * in + column, ascending
  at::Tensor values;     ///< float32 [c]
  at::Tensor bias;       ///< float32 [out], added to what the layer has
};

}  // namespace espalier::model
