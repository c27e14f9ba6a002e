#include "stages/prune/projection.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "pipeline/linalg/selection.h"
#include "stages/prune/kernels.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

void mark_by_cut(const linalg::Cut& cut, const float* score, int64_t first_index,
                 const TileView& view) {
  const int64_t taken_ties = cut.first_kept_index - first_index;
  // Locals, so that the loops vectorise.
  const float threshold = cut.threshold;
  uint8_t* pruned = view.pruned;
  const int64_t size = view.size, ties_end = std::clamp<int64_t>(taken_ties, 0, size);
  for (int64_t j = 0; j < ties_end; ++j) pruned[j] = score[j] <= threshold;
  for (int64_t j = ties_end; j < size; ++j) pruned[j] = score[j] < threshold;
}

}  // namespace

void mark_smallest_of_matrices(std::span<MatrixTask> tasks, std::span<const Tile> tiles,
                               std::span<const std::vector<float>> score,
                               std::span<const int64_t> count, Workers& workers,
                               const comm::Communicator& group) {
  // Every matrix has its selection on every rank, whoever owns its tiles.
  std::vector<linalg::Selection> batch(tasks.size());
  std::vector<std::vector<int64_t>> first_index(tasks.size());
  for (size_t i = 0; i < tiles.size(); ++i) {
    const MatrixTask& task = tasks[tiles[i].task];
    if (!task.pattern.unstructured()) continue;
    batch[tiles[i].task].pieces.push_back(score[i]);
    first_index[tiles[i].task].push_back(tiles[i].first * task.weight.size(1));
  }
  for (size_t t = 0; t < tasks.size(); ++t)
    batch[t].k = tasks[t].pattern.unstructured() ? count[t] : 0;
  const auto cuts = linalg::cut_smallest(batch, first_index, workers, group);
  for_each_tile(tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t i, int) {
    const MatrixTask& task = tasks[tile.task];
    if (task.pattern.unstructured())
      mark_by_cut(cuts[tile.task], score[i].data(), tile.first * view.columns, view);
    else
      mark_smallest_in_groups(score[i].data(), view.rows, view.columns, task.pattern, view.pruned);
  });
}

}  // namespace espalier::prune
