#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/linalg/selection.h"
#include "stages/prune/kernels.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

constexpr int64_t kUpdateColumns = 512;  // of the trailing product at a time: it stays in cache

// One worker's E [rows, block] and E R [rows, kUpdateColumns].
struct Workspace {
  std::vector<float> errors, update;
};

struct Solver {
  std::span<MatrixTask> tasks;
  std::span<const at::Tensor> factors;
  std::span<const std::vector<int64_t>> dead_inputs;
  const Pattern& pattern;
  int64_t block_size;
  bool keep_zeros;
  Workers& workers;
  const comm::Communicator& group;
  std::vector<Tile> tiles;
  std::vector<Workspace> workspaces;

  const at::Tensor& factor_of(const Tile& tile) const {
    return factors[tasks[tile.task].statistic];
  }
  int64_t width_at(int64_t first, int64_t columns) const {
    return std::min(block_size, columns - first);
  }
  void prepare(const TileView& view, const Tile& tile) const;
  void solve_block(const TileView& view, const Tile& tile, int64_t first,
                   Workspace& workspace) const;
  void solve_groups();
  void solve_unstructured();
  void solve_column_block(int64_t first);
};

void check(const Solver& solver) {
  check_tasks(solver.tasks, solver.pattern);
  if (!solver.pattern.unstructured() && solver.block_size % solver.pattern.group != 0)
    throw UserError(
        fmt::format("prune.block_size: {} is not a multiple of {}, the group of pattern {}",
                    solver.block_size, solver.pattern.group, solver.pattern.name()));
  for (const MatrixTask& task : solver.tasks) {
    const at::Tensor& factor = solver.factors[task.statistic];
    const int64_t columns = task.weight.size(1);
    if (factor.scalar_type() != at::kFloat || !factor.is_contiguous() || factor.dim() != 2 ||
        factor.size(0) != columns || factor.size(1) != columns)
      throw DefectError(fmt::format("{}: the factor is not a contiguous float32 [{}, {}]",
                                    task.name, columns, columns));
  }
}

void Solver::prepare(const TileView& view, const Tile& tile) const {
  const MatrixTask& task = tasks[tile.task];
  require_finite(task, view, "before pruning");
  std::memset(view.pruned, 0, static_cast<size_t>(view.size));
  if (keep_zeros) mark_zeros(view);
  for (const int64_t column : dead_inputs[task.statistic])
    for (int64_t row = 0; row < view.rows; ++row) view.weights[row * view.columns + column] = 0;
}

// The columns of one block, then W[:, later] -= E R[block, later].
void Solver::solve_block(const TileView& view, const Tile& tile, int64_t first,
                         Workspace& workspace) const {
  const int64_t width = width_at(first, view.columns);
  const at::Tensor& factor = factor_of(tile);
  workspace.errors.resize(view.rows * width);
  sparsegpt_block(view.weights, view.rows, view.columns, factor.const_data_ptr<float>(), first,
                  width, pattern, view.pruned, workspace.errors.data());
  const at::Tensor errors = at::from_blob(workspace.errors.data(), {view.rows, width}, at::kFloat);
  workspace.update.resize(view.rows * kUpdateColumns);
  for (int64_t later = first + width; later < view.columns; later += kUpdateColumns) {
    const int64_t count = std::min(kUpdateColumns, view.columns - later);
    at::Tensor update = at::from_blob(workspace.update.data(), {view.rows, count}, at::kFloat);
    linalg::product_into(update, errors, factor.narrow(0, first, width).narrow(1, later, count));
    subtract_columns(view.weights, view.rows, view.columns, later, count, workspace.update.data());
  }
  if (first + width == view.columns) require_finite(tasks[tile.task], view, "after SparseGPT");
}

// K:M couples no rows: a tile goes through all its blocks at once.
void Solver::solve_groups() {
  for_each_tile(tasks, tiles, workers,
                [&](const TileView& view, const Tile& tile, int64_t, int worker) {
                  prepare(view, tile);
                  for (int64_t first = 0; first < view.columns; first += block_size)
                    solve_block(view, tile, first, workspaces[worker]);
                });
}

// Columns [first, first + width) of all matrices that have them: scores, one exact threshold a
// matrix over all ranks, then the solve.
void Solver::solve_column_block(int64_t first) {
  std::vector<Tile> active;
  for (const Tile& tile : tiles)
    if (first < tasks[tile.task].weight.size(1)) active.push_back(tile);
  std::vector<std::vector<float>> score(active.size());
  for_each_tile(tasks, active, workers,
                [&](const TileView& view, const Tile& tile, int64_t i, int) {
                  const int64_t width = width_at(first, view.columns);
                  score[i].resize(view.rows * width);
                  sparsegpt_scores(view.weights, view.rows, view.columns,
                                   factor_of(tile).const_data_ptr<float>(), first, width,
                                   view.pruned, score[i].data());
                });

  std::vector<linalg::Selection> batch;
  std::vector<int64_t> selection_of(tasks.size(), -1);
  for (size_t t = 0; t < tasks.size(); ++t) {
    const int64_t rows = tasks[t].weight.size(0), columns = tasks[t].weight.size(1);
    if (first >= columns) continue;
    selection_of[t] = static_cast<int64_t>(batch.size());
    const auto entries = static_cast<double>(rows * width_at(first, columns));
    batch.push_back({{}, static_cast<int64_t>(std::floor(entries * pattern.sparsity))});
  }
  for (size_t i = 0; i < active.size(); ++i)
    batch[selection_of[active[i].task]].pieces.push_back(score[i]);
  const auto thresholds = linalg::kth_smallest(batch, workers, group);

  for_each_tile(
      tasks, active, workers, [&](const TileView& view, const Tile& tile, int64_t i, int worker) {
        mark_at_most(score[i].data(), view.rows, view.columns, first, width_at(first, view.columns),
                     thresholds[selection_of[tile.task]], view.pruned);
        solve_block(view, tile, first, workspaces[worker]);
      });
}

void Solver::solve_unstructured() {
  for_each_tile(tasks, tiles, workers,
                [&](const TileView& view, const Tile& tile, int64_t, int) { prepare(view, tile); });
  if (pattern.sparsity == 0) return;  // position 0 would still take one entry a block
  int64_t columns = 0;
  for (const MatrixTask& task : tasks) columns = std::max(columns, task.weight.size(1));
  for (int64_t first = 0; first < columns; first += block_size) solve_column_block(first);
}

}  // namespace

void prune_sparsegpt(std::span<MatrixTask> tasks, std::span<const at::Tensor> factors,
                     std::span<const std::vector<int64_t>> dead_inputs, const Pattern& pattern,
                     int64_t block_size, bool keep_zeros, Workers& workers,
                     const comm::Communicator& group) {
  Solver solver{tasks,
                factors,
                dead_inputs,
                pattern,
                block_size,
                keep_zeros,
                workers,
                group,
                tiles_of_rank(tasks, group.rank(), group.size()),
                std::vector<Workspace>(workers.count())};
  check(solver);
  if (pattern.unstructured())
    solver.solve_unstructured();
  else
    solver.solve_groups();
}

}  // namespace espalier::prune
