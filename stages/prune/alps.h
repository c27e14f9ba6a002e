#pragma once
/// ALPS (arXiv 2406.07831): mask and weights of a matrix by the alternating direction method of
/// multipliers on its layer's squared error.
///
/// With G' the scaled Gram, B0 = W E and T a matrix of the pattern: B = (G' + rho I)^-1 (G' B0 - V
/// + rho D), D = T nearest to B + V / rho, V += rho (B - D), until the mask rests; the penalty's
/// schedule is in alps.cpp. The mask is that of the last B; conjugate gradients end it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/prune/conjugate_gradients.h"
#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {

struct AlpsOptions {
  double rho = 0.1;             ///< penalty at the start
  int64_t iterations = 300;     ///< at most
  int64_t gradient_steps = 10;  ///< conjugate gradients' on the final mask
};

/// One input's: G' = Q diag(values) Q^T with the scaled Gram itself.
struct AlpsInput {
  SolverGram gram;
  at::Tensor vectors;  ///< Q, float32 [n, n], contiguous: eigenvectors are columns
  at::Tensor values;   ///< float32 [n]
};

/// How a matrix's iterations ended.
struct AlpsReport {
  int64_t iterations = 0;
  double rho = 0;
  double changed = 0;  ///< share of the kept positions that the last three iterations changed
};

/// Prunes this rank's tiles. Unstructured: the matrix keeps its round((1 - sparsity) rows n)
/// largest. All matrices advance together, so that an iteration costs three collectives
/// (unstructured), and every third one more. 4 rows n^2 FLOPs a matrix and iteration; memory 17 to
/// 21 bytes for every weight of this rank. Collective; one report a task, equal on every rank.
/// Throws NumericalError naming the matrix.
std::vector<AlpsReport> prune_alps(std::span<MatrixTask> tasks, std::span<const AlpsInput> inputs,
                                   const AlpsOptions& options, bool keep_zeros, Workers& workers,
                                   const comm::Communicator& group);

}  // namespace espalier::prune
