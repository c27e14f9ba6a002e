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

/// In every row marks the `count` smallest scores, ties by ascending column (a stable sort's
/// order). Exactly `count` a row. Scores are finite and >= 0.
void mark_smallest_in_rows(const float* score, int64_t rows, int64_t columns, int64_t count,
                           uint8_t* pruned);

/// In every group of `pattern.group` consecutive columns of a row marks the group - keep smallest,
/// ties by ascending column. The fast path is 2:4; any K:M up to 64 works.
void mark_smallest_in_groups(const float* score, int64_t rows, int64_t columns,
                             const Pattern& pattern, uint8_t* pruned);

/// w = pruned ? 0 : w.
void apply_mask(float* weights, const uint8_t* pruned, int64_t count);

/// SparseGPT's scores of columns [first, first + width) of a tile: w^2 / R_jj^2 (FLT_MIN at least),
/// weights as updated so far; 0 where `pruned` is already set (zeros of a sparse model go first).
/// score [rows, width] contiguous.
void sparsegpt_scores(const float* weights, int64_t rows, int64_t columns, const float* factor,
                      int64_t first, int64_t width, const uint8_t* pruned, float* score);

/// pruned |= score <= threshold, on columns [first, first + width) of a tile; score [rows, width].
void mark_at_most(const float* score, int64_t rows, int64_t columns, int64_t first, int64_t width,
                  float threshold, uint8_t* pruned);

/// SparseGPT (arXiv 2301.00774, algorithm 1), columns [first, first + width) of one tile: zeroes
/// the masked entries and passes their error on inside the block. The later columns are the
/// caller's: W[:, first + width:] -= E R[block, later], a product of linalg.
///
/// weights  float32 [rows, columns], changed inside the block
/// factor   float32 [columns, columns], R upper triangular (zeros below), H^-1 = R^T R
/// pruned   [rows, columns]: unstructured: this block's columns are marked already. K:M: marked
/// here
///          at each group's first column, beside what is set on entry; the group divides `first`
///          and `width`
/// errors   out: E [rows, width], 0 where a weight stays
/// rows width^2 FLOPs at most; entries that stay cost nothing.
void sparsegpt_block(float* weights, int64_t rows, int64_t columns, const float* factor,
                     int64_t first, int64_t width, const Pattern& pattern, uint8_t* pruned,
                     float* errors);

/// W[:, first : first + width) -= update, of a tile; update [rows, width] contiguous.
void subtract_columns(float* weights, int64_t rows, int64_t columns, int64_t first, int64_t width,
                      const float* update);

}  // namespace espalier::prune
