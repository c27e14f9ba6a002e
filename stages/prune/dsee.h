#pragma once
/// DSEE's unstructured masks (arXiv 2111.00160, step 2): matrices that have added terms form one
/// group over all blocks, all other linear layers a second. Each group loses exactly floor(number *
/// sparsity) weights by one global threshold, the first on the criterion, the second on |W|; ties
/// go by block, matrix and flat index, the lower first.
///
/// The model is walked a unit at a time: a unit's matrices are a block's, or the pooler.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/prune/criterion.h"
#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {

struct DseeRule {
  Criterion criterion = Criterion::delta;
  double sparsity = 0.5;
  uint64_t seed = 0;
  bool keep_zeros = true;  ///< weights that are 0 go before all others
};

/// Matrices and what stands beside each.
struct JudgedMatrices {
  std::vector<MatrixTask> tasks;  ///< named by their weights
  std::vector<Terms> terms;       ///< of each task
};

/// How many weights every matrix loses.
struct DseeLosses {
  std::vector<std::vector<int64_t>> count;  ///< [unit][matrix]
  struct Group {
    int64_t matrices = 0, weights = 0, lost = 0;
  };
  Group with_terms, without_terms;
};

/// Finds the thresholds in three walks over the model (linalg::StreamedSelection), one unit in
/// memory at a time. `sizes`: how many matrices each unit has; `matrices` gives a unit's, the same
/// on every rank; `after_unit` hears how many units of the three walks are done. Collective; the
/// same on any number of ranks and workers.
DseeLosses count_dsee_losses(std::span<const int64_t> sizes,
                             const std::function<JudgedMatrices(int64_t unit)>& matrices,
                             const DseeRule& rule, Workers& workers,
                             const comm::Communicator& group,
                             const std::function<void(int64_t done)>& after_unit);

/// Masks and prunes this rank's tiles of one unit's matrices (see matrix_pruning.h): the
/// `count[task]` lowest of each. Collective.
void prune_dsee(std::span<MatrixTask> tasks, std::span<const Terms> terms,
                std::span<const int64_t> count, const DseeRule& rule, Workers& workers,
                const comm::Communicator& group);

}  // namespace espalier::prune
