#pragma once
/// Singular value decompositions on one thread, in float64 inside.

#include <ATen/core/Tensor.h>

namespace espalier::linalg {

/// a = u diag(s) v^T: u [m, k], s [k] descending, v [n, k], float64. Signs are fixed (the entry of
/// u of largest magnitude, first on ties, is positive).
struct Svd {
  at::Tensor u, s, v;
};

/// Leading k singular triplets of a [m, n] float32 or float64. Randomized block Krylov or subspace
/// iteration with a checked residual: iterates until every ||A^T u_i - s_i v_i|| <= tolerance *
/// s_0, and falls through to the full decomposition when k is a large part of min(m, n), where that
/// is cheaper. Deterministic: the start is counter-based, keyed by `seed`.
Svd truncated_svd(const at::Tensor& a, int64_t k, uint64_t seed, double tolerance = 1e-5);

/// The whole decomposition (k = min(m, n)).
Svd full_svd(const at::Tensor& a);

/// Nearest matrix with orthonormal columns: the polar factor W V^T of x = W S V^T [m, k], m >= k,
/// in float64. Rank-deficient inputs give some completion. Throws NumericalError on NaN or Inf.
at::Tensor polar_factor(const at::Tensor& x);

}  // namespace espalier::linalg
