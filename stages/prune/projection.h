#pragma once
/// The patterns' largest entries of whole matrices, over all ranks.

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {

/// Marks in this rank's `tiles` the smallest scores (finite, >= 0): exactly count[task] of a whole
/// unstructured matrix, ties by flat index; of every group of K:M the M - K smallest, ties by
/// column.
///
/// tiles  this rank's of the matrices to mark: all of a matrix's tiles over all ranks, or none
/// score  of each tile, [rows, columns]
/// count  of each task; 0 where its tiles are left out
/// Collective: three collectives, and two for each matrix with ties on both sides of its cut.
void mark_smallest_of_matrices(std::span<MatrixTask> tasks, std::span<const Tile> tiles,
                               std::span<const std::vector<float>> score,
                               std::span<const int64_t> count, Workers& workers,
                               const comm::Communicator& group);

}  // namespace espalier::prune
