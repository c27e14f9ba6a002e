#pragma once
/// Low-rank factors of a difference that counts inside a mask alone: minimise ||(Delta - L) *
/// mask||^2 over L of a rank. Whatever L holds off the mask is dropped when it is decoded, so its
/// values there are free, and the singular vectors of Delta with zeros off the mask are far from
/// the best (SmolLM2 at 2:4 after SPP, mlp.up_proj at rank 80: 0.47 of the squares are lost by the
/// truncated decomposition, 0.28 by 24 steps of this).
///
/// Matrix completion by expectation and maximisation (Srebro & Jaakkola, ICML 2003) with momentum
/// (Nesterov, restarted when the objective rises) and one step of subspace iteration in place of
/// each singular value decomposition: X = Y + (Delta - Y) * mask, Y extrapolated from the last two
/// L; Q = basis of X V^T, V = Q^T X, L = Q V.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "stages/compress/spectrum.h"

namespace espalier::compress {

struct MaskedFactors {
  at::Tensor u, s, v;  ///< float32 [m, r], float64 [r], float32 [n, r]: L = u diag(s) v^T
  double lost = 0;     ///< ||(Delta - L) * mask||^2
};

/// Whether so much of a base that keeps its zeros is masked that completion pays (a sixteenth);
/// with a few zeros the truncated decomposition is as good, and exact.
bool worth_completing(const at::Tensor& base);

/// The largest rank whose free parameters, r (m + n - r), are fewer than the entries inside the
/// mask (at least 1): beyond it the residual is nothing.
int64_t largest_masked_rank(int64_t rows, int64_t columns, int64_t entries);

/// `steps` steps from a random start keyed by `seed`: 6 m n r FLOPs each in float32, and a QR of
/// [m, r]. delta is float64 and 0 off the bool mask [m, n]. One thread.
MaskedFactors complete(const at::Tensor& delta, const at::Tensor& mask, int64_t truncation_rank,
                       int most_steps, uint64_t seed);

/// What the allocation is to know of such a matrix: `values` of all ranks up to
/// largest_masked_rank, value^2 = what one rank more gains. The lost energy f(r) is measured at
/// half and at three halves of `average_rank` by short completions and taken as log-linear between
/// (ln f(r) fell by 0.028, 0.029 and 0.044 a rank up to ranks 16, 48 and 96 of a q_proj above). No
/// vectors.
Decomposition masked_decomposition(const at::Tensor& delta, const at::Tensor& mask,
                                   double average_rank, uint64_t seed);

}  // namespace espalier::compress
