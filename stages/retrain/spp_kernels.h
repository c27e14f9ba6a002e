#pragma once
/// The elementwise passes of SPP over one matrix, vectorised (Highway), on one worker.
///
/// W [rows, columns] row-major, float32 or bfloat16 (`Matrix::narrow`); row i belongs to group
/// i / (rows / groups). A null alpha or beta stands for ones.

#include <cstdint>

namespace espalier::retrain {

struct SppMatrix {
  const void* weights;
  bool narrow;  ///< bfloat16
  int64_t rows, columns, groups;
  const float* alpha;  ///< [groups, columns]
  const float* beta;   ///< [rows]
};

/// out = W * (base + scale * repeat(alpha) * beta) in W's type, computed in float32 and rounded once
/// to nearest even. One pass.
void spp_effective(const SppMatrix& matrix, float base, float scale, void* out);

/// With G [rows, columns] = dL/dW_eff in float32: alpha_gradient[j] = scale * sum over the rows i of
/// group j of beta_i W_i G_i, beta_gradient[i] = scale * sum over columns of alpha_j W_i G_i. Either
/// may be null. One pass over W and G.
void spp_reduce(const SppMatrix& matrix, const float* gradient, float scale, float* alpha_gradient,
                float* beta_gradient);

}  // namespace espalier::retrain
