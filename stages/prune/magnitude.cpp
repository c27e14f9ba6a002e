#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "pipeline/linalg/selection.h"
#include "stages/prune/kernels.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

// Exactly k of the whole matrix: the cut is selected over all ranks' tiles.
void mark_matrix(std::span<MatrixTask> one, const Pattern& pattern, std::span<const Tile> tiles,
                 Workers& workers, const comm::Communicator& group) {
  const int64_t columns = one[0].weight.size(1);
  std::vector<std::vector<float>> magnitude(tiles.size());
  for_each_tile(one, tiles, workers, [&](const TileView& view, const Tile&, int64_t i, int) {
    magnitude[i].resize(view.size);
    scores(view.weights, nullptr, view.rows, view.columns, magnitude[i].data());
  });
  linalg::Selection selection;
  std::vector<int64_t> first_index;
  for (size_t i = 0; i < tiles.size(); ++i) {
    selection.pieces.push_back(magnitude[i]);
    first_index.push_back(tiles[i].first * columns);
  }
  selection.k = static_cast<int64_t>(
      std::floor(static_cast<double>(one[0].weight.numel()) * pattern.sparsity));
  const linalg::Cut cut = linalg::cut_smallest(selection, first_index, workers, group);
  for_each_tile(one, tiles, workers, [&](const TileView& view, const Tile&, int64_t i, int) {
    const int64_t taken_ties = cut.first_kept_index - first_index[i];
    // Locals, so that the loops vectorise.
    const float* value = magnitude[i].data();
    const float threshold = cut.threshold;
    uint8_t* pruned = view.pruned;
    const int64_t size = view.size, ties_end = std::clamp<int64_t>(taken_ties, 0, size);
    for (int64_t j = 0; j < ties_end; ++j) pruned[j] = value[j] <= threshold;
    for (int64_t j = ties_end; j < size; ++j) pruned[j] = value[j] < threshold;
  });
}

}  // namespace

void prune_magnitude(std::span<MatrixTask> tasks, const Pattern& pattern, bool keep_zeros,
                     Workers& workers, const comm::Communicator& group) {
  check_tasks(tasks, pattern);
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  std::vector<std::vector<float>> score(workers.count());
  for_each_tile(tasks, tiles, workers,
                [&](const TileView& view, const Tile& tile, int64_t, int worker) {
                  require_finite(tasks[tile.task], view, "before pruning");
                  if (pattern.unstructured()) return;
                  score[worker].resize(view.size);
                  scores(view.weights, nullptr, view.rows, view.columns, score[worker].data());
                  mark_smallest_in_groups(score[worker].data(), view.rows, view.columns, pattern,
                                          view.pruned);
                });
  if (pattern.unstructured())
    for (size_t t = 0; t < tasks.size(); ++t) {
      std::vector<Tile> of_task;
      for (const Tile& tile : tiles)
        if (tile.task == static_cast<int64_t>(t)) of_task.push_back({0, tile.first, tile.rows});
      mark_matrix(tasks.subspan(t, 1), pattern, of_task, workers, group);
    }
  for_each_tile(tasks, tiles, workers, [&](const TileView& view, const Tile&, int64_t, int) {
    if (keep_zeros) mark_zeros(view);
    apply_mask(view.weights, view.pruned, view.size);
  });
}

}  // namespace espalier::prune
