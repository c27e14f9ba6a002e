#pragma once
/// Pruning of one block's matrices, spread over ranks and workers by tiles of kTileRows rows.
///
/// Tiles are counted over all matrices in order; rank = tile % ranks owns it, and the rank's
/// workers take its tiles one by one. A tile's bits depend on neither. The prune_* functions are
/// collective, change this rank's tiles only (weight and mask), and leave the rest to gather_rows.
///
/// keep_zeros: entries that are 0 beforehand have score 0, all others more, so that they go first;
/// all are marked in the mask, also those beyond the pattern's count, and stay exactly 0.
///
/// Each task has its own pattern. All throw UserError when a K:M pattern does not divide a matrix's
/// inputs, and NumericalError naming the matrix when a weight is NaN or Inf.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"
#include "stages/prune/pattern.h"

namespace espalier::prune {

struct MatrixTask {
  std::string name;       ///< "block 3 self_attn.q_proj"
  at::Tensor weight;      ///< float32 [rows, columns], contiguous, whole on every rank
  int64_t statistic = 0;  ///< index of the distinct input that the matrix reads
  at::Tensor mask;        ///< uint8 [rows, columns], contiguous; out: 1 where pruned
  Pattern pattern = {};   ///< what this matrix loses
};

/// Rows [first, first + rows) of tasks[task].
struct Tile {
  int64_t task = 0, first = 0, rows = 0;
};

/// The tiles that `rank` of `size` owns, in order.
std::vector<Tile> tiles_of_rank(std::span<const MatrixTask> tasks, int rank, int size);

/// Magnitude: exactly floor(rows * columns * sparsity) of a matrix's smallest |W|, ties by flat
/// index; or of every group of K:M.
void prune_magnitude(std::span<MatrixTask> tasks, bool keep_zeros, Workers& workers,
                     const comm::Communicator& group);

/// Wanda (arXiv 2306.11695): in every row the floor(columns * sparsity) smallest |W_ij| norm_j,
/// ties by column; or of every group of K:M. norms  sqrt(a_j) of each distinct input [columns]
void prune_wanda(std::span<MatrixTask> tasks, std::span<const std::vector<float>> norms,
                 bool keep_zeros, Workers& workers, const comm::Communicator& group);

/// Wanda's variant (its program's use_variant), unstructured: a row loses its smallest scores as
/// long as their sum is at most alpha times the row's; alpha, one for the matrix, is bisected from
/// 0.4 in [0, 0.8] until the matrix's sparsity is within 0.001 or the bracket narrower than that.
/// Ties by column. UserError for a K:M pattern. One sort of every row; a collective a step.
void prune_wanda_cumulative(std::span<MatrixTask> tasks, std::span<const std::vector<float>> norms,
                            bool keep_zeros, Workers& workers, const comm::Communicator& group);

/// SparseGPT (arXiv 2301.00774, algorithm 1): prunes and corrects the weights that stay.
///
/// factors      R of each distinct input, float32 [columns, columns] contiguous (inverse_factor)
/// dead_inputs  of each distinct input: those columns become 0 before anything else
/// block_size   columns that are solved together; K:M: a multiple of M, else UserError
///
/// Unstructured: in every block of columns the entries up to and including the score at position
/// floor(rows * width * sparsity) go (nothing when sparsity is 0); all matrices advance together,
/// so that a block costs three collectives. 2 rows columns^2 FLOPs a matrix; workspace block_size
/// floats for every row of this rank.
void prune_sparsegpt(std::span<MatrixTask> tasks, std::span<const at::Tensor> factors,
                     std::span<const std::vector<int64_t>> dead_inputs, int64_t block_size,
                     bool keep_zeros, Workers& workers, const comm::Communicator& group);

/// Gives every rank all tiles' masks and weights: each matrix's masks travel once as bits, its
/// weights once when `weights_changed` (otherwise the mask is applied here). One collective a
/// matrix.
void gather_rows(std::span<MatrixTask> tasks, bool weights_changed,
                 const comm::Communicator& group);

}  // namespace espalier::prune
