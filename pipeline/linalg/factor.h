#pragma once
/// The factor of a Gram that layer-wise solvers need.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace espalier::linalg {

struct FactorReport {
  double damping = 0;                ///< share of mean(diag H) that was added at last
  int times_raised = 0;              ///< tenfold each
  std::vector<int64_t> dead_inputs;  ///< inputs with H_jj = 0, ascending
};

/// R of SparseGPT (arXiv 2301.00774): H^-1 = R^T R with R upper triangular, without an inverse of
/// H: H = C C^T with C upper triangular (Cholesky of the reversed matrix), R = C^-1.
///
/// gram     float64 [n, n]  H before damping, both triangles; changed (dead inputs get H_jj = 1)
/// damping  share of mean(diag H) added to the diagonal; raised tenfold at most four times while H
///          is not positive definite, and reported
/// returns  float32 [n, n], upper triangular, zeros below; computed in float64.
/// 2/3 n^3 FLOPs on one thread (61 ms at n = 1536). Throws NumericalError (what: "block 3
/// self_attn.q_proj") when H holds NaN or Inf or stays indefinite.
at::Tensor inverse_factor(at::Tensor& gram, double damping, const std::string& what,
                          FactorReport& report);

}  // namespace espalier::linalg
