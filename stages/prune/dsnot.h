#pragma once
/// DSnoT (arXiv 2310.08915): a mask refined without training, row by row. A row's expected error is
/// that of what was pruned, the sum of W_ij mean_j; weights are grown and pruned in pairs so that
/// it nears 0.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/options.h"
#include "stages/prune/statistics.h"

namespace espalier::prune {

/// One row of n inputs.
struct DsnotRow {
  const float* weights;  ///< before pruning
  const float* means;
  const float* variances;
  const float* norms;
  int64_t n;
};

/// Swaps pairs until the error is at most `threshold` in magnitude, `cycles` pairs are swapped, or
/// no pair helps. A pair: of the weights that the first mask pruned, the one whose W mean /
/// variance has the error's sign and is largest is grown; of those that it kept, the one of the
/// smallest |W| norm goes, unstructured: among those whose W mean has the other sign; K:M: of the
/// grown weight's group, and the row ends before the error would change its sign. Ties fall to the
/// lower column, and no weight is swapped twice. The number of pruned weights stays, also of every
/// group. pruned [n], in and out. Returns the pairs swapped.
int64_t refine_row(const DsnotRow& row, const Pattern& pattern, const RefineOptions& options,
                   uint8_t* pruned);

/// Refines this rank's tiles of the tasks that `refined` names; their weights become the dense ones
/// under the new mask (corrections that a method made to weights that stay are given up; a refit
/// makes new ones). Zeros of a sparse model are never grown.
///
/// tasks  pruned, with their masks
/// dense  of each task, float32 [rows, n]: its weights before pruning
/// Collective; returns the pairs swapped over all ranks.
int64_t refine_by_dsnot(std::span<MatrixTask> tasks, std::span<const uint8_t> refined,
                        std::span<const at::Tensor> dense,
                        std::span<const InputStatistics> statistics, const RefineOptions& options,
                        Workers& workers, const comm::Communicator& group);

}  // namespace espalier::prune
