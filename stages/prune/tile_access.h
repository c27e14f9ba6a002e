#pragma once
/// What the pruning methods share about a tile: pointers, checks, zeros of a sparse model.

#include <cstdint>
#include <span>

#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {

/// One tile of a task as raw memory: [rows, columns] contiguous.
struct TileView {
  float* weights;
  uint8_t* pruned;
  int64_t rows, columns, size;
};

TileView view_of(const MatrixTask& task, const Tile& tile);

/// Throws DefectError on shapes and types that are not MatrixTask's, UserError when a pattern's
/// group does not divide the inputs.
void check_tasks(std::span<const MatrixTask> tasks);

/// Throws NumericalError naming the matrix. `when`: "before pruning".
void require_finite(const MatrixTask& task, const TileView& view, const char* when);

/// pruned |= (w == 0).
void mark_zeros(const TileView& view);

/// Runs body(view, tile, worker) on this rank's tiles.
template <class Body>
void for_each_tile(std::span<MatrixTask> tasks, std::span<const Tile> tiles, Workers& workers,
                   const Body& body) {
  workers.for_each(static_cast<int64_t>(tiles.size()), [&](int64_t i, int worker) {
    const Tile& tile = tiles[static_cast<size_t>(i)];
    body(view_of(tasks[static_cast<size_t>(tile.task)], tile), tile, i, worker);
  });
}

}  // namespace espalier::prune
