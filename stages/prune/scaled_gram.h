#pragma once
/// The Gram that ALPS and the refit solve with: damped, and scaled to a unit diagonal.

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace espalier::prune {

/// G' = E^-1 (G + damping mean(diag G) I) E^-1 with E the square root of its diagonal, so that
/// W G W^T = (W E) G' (W E)^T.
struct ScaledGram {
  at::Tensor gram;                    ///< float64 [n, n]
  std::vector<float> scale, inverse;  ///< [n]: E and E^-1
};

/// gram float64 [n, n], changed. An input that never was active and is not damped gets a diagonal
/// of
/// 1. Throws NumericalError naming `what` on NaN or Inf.
ScaledGram scale_gram(at::Tensor gram, double damping, const std::string& what);

}  // namespace espalier::prune
