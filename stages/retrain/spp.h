#pragma once
/// SPP (arXiv 2405.16057, eq. 4-7): retraining inside a fixed mask.
///
/// alpha [groups, in], beta [out]; W' = W * repeat_rows(alpha, out / groups) * beta[:, None]; the
/// matrix acts as W + s W'. A zero of W stays a zero whatever alpha and beta are.
///
/// Without dropout W_eff = W * (1 + s * repeat(alpha) * beta) is formed once a step and a matrix costs
/// one product forward and two backward (dx = dy W_eff, G = dy^T x), G being reduced to the two
/// gradients in one pass and dropped. Memory: W_eff beside W. With dropout, y = x W^T + dropout(x)
/// (s W')^T, one product more each way.

#include <memory>

#include "stages/retrain/adapter.h"

namespace espalier::retrain {

struct SppOptions {
  int64_t groups = 16;      ///< r, the row groups; must divide the rows of every target
  double scale = 2;         ///< s
  double dropout = 0.05;
  bool beta = true;         ///< false: W' = W * repeat(alpha), alpha = 0 at the start
  bool residual = true;     ///< false: the matrix acts as W * alpha * beta, from ones (Remark 1)
  bool random_init = false; ///< the added weights start at random values instead of 0
};

std::unique_ptr<AdapterMethod> make_spp(const SppOptions& options);

}  // namespace espalier::retrain
