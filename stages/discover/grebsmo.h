#pragma once
/// GreBsmo (Zhou & Tao, AISTATS 2013; DSEE, arXiv 2111.00160, algorithm 1): W ~ U V + S with
/// rank(U V) <= r and card(S) <= c, minimising 1/2 ||W - U V - S||^2 by bilateral steps that need
/// no singular value decomposition, the rank growing on the way. The index set is S's support.
///
/// One bilateral step, A = W - S: U = orthonormal basis of A V^T, V = U^T A, S = the entries of
/// W - U V that stand out. Two forms:
/// published  as the authors' program: one random row of V at the start; each of at most
///            `outer_steps` sets S = 0, takes two bilateral steps with S = all entries above tau,
///            and appends to V the first 5 rows of R, QR = W - U V - S.
/// fast       (ours) S is what the problem allows, the c largest entries above tau, and stays from
///            step to step; V grows by its own size, from a random sketch of the residual's rows
///            (signs drawn by counter), and steps at the full rank end when the objective falls by
///            less than `improvement` of itself.
/// In both tau = threshold * the scale of W - U V (its mean magnitude times sqrt(pi / 2), the rms
/// if it is normal; outliers hardly move it): the program's constant 0.01 leaves S empty or full,
/// whichever the size of the weights makes it. Both report the objective with the c largest.

#include <cstdint>
#include <optional>

#include "stages/discover/method.h"

namespace espalier::discover {

struct GrebsmoOptions {
  bool published = false;
  /// r; unset: 496 (the program's), but below half of the smaller side, where the low-rank part
  /// would take up the outliers. Always below the smaller side.
  std::optional<int64_t> rank;
  double threshold = 1;       ///< tau / scale of the residual
  double tolerance = 1e-3;    ///< growth ends when ||W - U V - S|| <= tolerance ||W||
  double improvement = 1e-2;  ///< fast
  int64_t outer_steps = 100;  ///< published; fast: most steps at the full rank
};

/// The rank that a matrix of this shape is given.
int64_t rank_cap(const GrebsmoOptions& options, int64_t rows, int64_t columns);

/// About 6 rows columns r FLOPs a bilateral step and a QR of [rows, r], in float32; workspace three
/// matrices of W's size. Throws NumericalError naming the matrix when fewer than `cardinality`
/// entries are above tau.
IndexSet grebsmo(const Matrix& matrix, int64_t cardinality, const GrebsmoOptions& options);

}  // namespace espalier::discover
