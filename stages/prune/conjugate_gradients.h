#pragma once
/// The weights that stay, solved for on their mask: min over X with the mask's zeros of
/// (X - W) G (X - W)^T, row by row, by conjugate gradients (the last step of ALPS, arXiv
/// 2406.07831, which improves any method's weights).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/scaled_gram.h"

namespace espalier::prune {

/// A Gram scaled to a unit diagonal, float32, as the solvers read it.
struct SolverGram {
  at::Tensor gram;                    ///< float32 [n, n]
  std::vector<float> scale, inverse;  ///< [n]
};
SolverGram solver_gram(const ScaledGram& scaled);

/// One worker's buffers.
struct GradientWorkspace {
  std::vector<float> residual, direction, image;
};

/// `steps` steps on x [rows, n], whose pruned entries are 0 and stay 0, towards `target` [rows, n]:
/// both in the scaled space. steps + 1 products of 2 rows n^2 FLOPs.
void conjugate_gradients(const float* target, const uint8_t* pruned, int64_t rows,
                         const at::Tensor& gram, int64_t steps, float* x,
                         GradientWorkspace& workspace);

/// The kept weights of this rank's tiles, solved for from where they stand.
///
/// tasks  pruned, with their masks
/// dense  of each task, float32 [rows, n]: its weights before pruning
/// grams  by MatrixTask::statistic
/// Throws NumericalError naming the matrix when a weight becomes NaN or Inf.
void refit(std::span<MatrixTask> tasks, std::span<const at::Tensor> dense,
           std::span<const SolverGram> grams, int64_t steps, Workers& workers,
           const comm::Communicator& group);

}  // namespace espalier::prune
