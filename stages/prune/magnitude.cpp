#include <ATen/ATen.h>

#include "stages/prune/kernels.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/method.h"
#include "stages/prune/projection.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

class Magnitude : public PruningMethod {
 public:
  std::optional<int64_t> zeros(const Pattern& pattern, int64_t rows,
                               int64_t columns) const override {
    if (!pattern.unstructured()) return PruningMethod::zeros(pattern, rows, columns);
    return pattern.removed_of(rows * columns);
  }
  void prune(BlockWork& work) override {
    prune_magnitude(work.tasks, work.keep_zeros, work.workers(), work.group());
  }
};

const MethodRegistration registration{
    "magnitude", [](const config::Section&) { return std::make_unique<Magnitude>(); }};

}  // namespace

void prune_magnitude(std::span<MatrixTask> tasks, bool keep_zeros, Workers& workers,
                     const comm::Communicator& group) {
  check_tasks(tasks);
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  std::vector<std::vector<float>> score(tiles.size());
  for_each_tile(tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t i, int) {
    require_finite(tasks[tile.task], view, "before pruning");
    score[i].resize(view.size);
    scores(view.weights, nullptr, view.rows, view.columns, score[i].data());
  });
  std::vector<int64_t> count;
  for (const MatrixTask& task : tasks)
    count.push_back(task.pattern.removed_of(task.weight.numel()));
  mark_smallest_of_matrices(tasks, tiles, score, count, workers, group);
  for_each_tile(tasks, tiles, workers, [&](const TileView& view, const Tile&, int64_t, int) {
    if (keep_zeros) mark_zeros(view);
    apply_mask(view.weights, view.pruned, view.size);
  });
}

}  // namespace espalier::prune
