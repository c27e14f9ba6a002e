#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "pipeline/errors.h"
#include "stages/prune/kernels.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {

void prune_wanda(std::span<MatrixTask> tasks, std::span<const std::vector<float>> norms,
                 const Pattern& pattern, bool keep_zeros, Workers& workers,
                 const comm::Communicator& group) {
  check_tasks(tasks, pattern);
  for (const MatrixTask& task : tasks)
    if (static_cast<int64_t>(norms[task.statistic].size()) != task.weight.size(1))
      throw DefectError(fmt::format("{}: {} input norms for {} inputs", task.name,
                                    norms[task.statistic].size(), task.weight.size(1)));
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  std::vector<std::vector<float>> score(workers.count());
  for_each_tile(
      tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t, int worker) {
        const MatrixTask& task = tasks[tile.task];
        require_finite(task, view, "before pruning");
        auto& buffer = score[worker];
        buffer.resize(view.size);
        scores(view.weights, norms[task.statistic].data(), view.rows, view.columns, buffer.data());
        if (pattern.unstructured())
          mark_smallest_in_rows(buffer.data(), view.rows, view.columns,
                                static_cast<int64_t>(std::floor(static_cast<double>(view.columns) *
                                                                pattern.sparsity)),
                                view.pruned);
        else
          mark_smallest_in_groups(buffer.data(), view.rows, view.columns, pattern, view.pruned);
        if (keep_zeros) mark_zeros(view);
        apply_mask(view.weights, view.pruned, view.size);
      });
}

}  // namespace espalier::prune
