#pragma once
/// The CPU kernels of pruning, vectorised (Highway), one tile of rows at a time on one worker.
///
/// A tile is at most 128 rows of one matrix. `pruned` bytes are 1 where the weight goes.

#include <cstdint>

#include "stages/prune/pattern.h"

namespace espalier::prune {

inline constexpr int64_t kTileRows = 128;

/// score[i,j] = |W[i,j]| * norm[j] (Wanda, arXiv 2306.11695) or |W[i,j]| when norm is null.
/// W, score float32 [rows, columns] contiguous.
void scores(const float* weights, const float* norm, int64_t rows, int64_t columns, float* score);

/// In every row marks the `count` smallest scores, ties by ascending column (a stable sort's order).
/// Exactly `count` a row. Scores are finite and >= 0.
void mark_smallest_in_rows(const float* score, int64_t rows, int64_t columns, int64_t count,
                           uint8_t* pruned);

/// In every group of `pattern.group` consecutive columns of a row marks the group - keep smallest,
/// ties by ascending column. The fast path is 2:4; any K:M up to 64 works.
void mark_smallest_in_groups(const float* score, int64_t rows, int64_t columns,
                             const Pattern& pattern, uint8_t* pruned);

/// w = pruned ? 0 : w.
void apply_mask(float* weights, const uint8_t* pruned, int64_t count);

/// SparseGPT's scores of columns [first, first + width) of a tile: w^2 / R_jj^2, with the weights as
/// updated so far. score [rows, width] contiguous.
void sparsegpt_scores(const float* weights, int64_t rows, int64_t columns, const float* factor,
                      int64_t first, int64_t width, float* score);

/// SparseGPT (arXiv 2301.00774, algorithm 1), columns [first, first + width) of one tile: zeroes the
/// masked entries, passes their error on inside the block, then W[:, first+width:] -= E R[block, later].
///
/// weights    float32 [rows, columns], changed
/// factor     float32 [columns, columns], R upper triangular, H^-1 = R^T R
/// pruned     [rows, columns]: for unstructured, columns of this block already marked (score <=
///            threshold); for K:M this function marks them itself at each group's first column
/// workspace  rows * width floats
/// 2 rows width (columns - first) FLOPs; the trailing product goes to linalg::product_into.
void sparsegpt_block(float* weights, int64_t rows, int64_t columns, const float* factor,
                     int64_t first, int64_t width, const Pattern& pattern, uint8_t* pruned,
                     float* workspace);

}  // namespace espalier::prune
