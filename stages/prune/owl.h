#pragma once
/// OWL (arXiv 2310.05175): blocks with more outliers stay denser.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/workers.h"

namespace espalier::prune {

/// A matrix and the norms of its input.
struct NormedMatrix {
  at::Tensor weight;                ///< float32 [rows, n], contiguous
  const std::vector<float>* norms;  ///< [n]
};

/// Share of a block's entries |W_ij| norm_j above `factor` times the mean over all its matrices.
/// The same bits on any number of workers: sums over tiles of rows, added in their order.
double outlier_ratio(std::span<const NormedMatrix> matrices, double factor, Workers& workers);

/// Each block's sparsity: the ratios, scaled linearly onto [0, 2 span], are taken off so that the
/// mean over all weights (a block weighs as much as its parameters) is `sparsity`; then clamped to
/// [0, 1), which may move the mean. Equal ratios give `sparsity` everywhere.
std::vector<double> owl_sparsities(std::span<const double> ratios,
                                   std::span<const int64_t> parameters, double sparsity,
                                   double span);

}  // namespace espalier::prune
