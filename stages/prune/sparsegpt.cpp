#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pipeline/errors.h"
#include "pipeline/linalg/factor.h"
#include "pipeline/linalg/product.h"
#include "pipeline/linalg/selection.h"
#include "stages/prune/kernels.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/method.h"
#include "stages/prune/once_per_input.h"
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
  int64_t block_size;
  bool keep_zeros;
  Workers& workers;
  const comm::Communicator& group;
  std::vector<Tile> tiles;
  std::vector<Workspace> workspaces;

  const at::Tensor& factor_of(const Tile& tile) const {
    return factors[tasks[tile.task].statistic];
  }
  // Whether columns from `first` on are cut by a threshold over all rows. At sparsity 0 position 0
  // would still take one entry a block.
  static bool has_block(const MatrixTask& task, int64_t first) {
    return task.pattern.unstructured() && task.pattern.sparsity > 0 && first < task.weight.size(1);
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
  check_tasks(solver.tasks);
  for (const MatrixTask& task : solver.tasks) {
    if (!task.pattern.unstructured() && solver.block_size % task.pattern.group != 0)
      throw UserError(
          fmt::format("prune.block_size: {} is not a multiple of {}, the group of {}'s pattern {}",
                      solver.block_size, task.pattern.group, task.name, task.pattern.name()));
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
                  width, tasks[tile.task].pattern, view.pruned, workspace.errors.data());
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
                  if (tasks[tile.task].pattern.unstructured()) return;
                  for (int64_t first = 0; first < view.columns; first += block_size)
                    solve_block(view, tile, first, workspaces[worker]);
                });
}

// Columns [first, first + width) of all matrices that have them: scores, one exact threshold a
// matrix over all ranks, then the solve.
void Solver::solve_column_block(int64_t first) {
  if (std::none_of(tasks.begin(), tasks.end(),
                   [&](const MatrixTask& task) { return has_block(task, first); }))
    return;
  std::vector<Tile> active;
  for (const Tile& tile : tiles)
    if (has_block(tasks[tile.task], first)) active.push_back(tile);
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
    if (!has_block(tasks[t], first)) continue;
    selection_of[t] = static_cast<int64_t>(batch.size());
    const int64_t entries = rows * width_at(first, columns);
    batch.push_back({{}, tasks[t].pattern.removed_of(entries)});
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
  int64_t columns = 0;
  for (const MatrixTask& task : tasks) columns = std::max(columns, task.weight.size(1));
  for (int64_t first = 0; first < columns; first += block_size) solve_column_block(first);
}

class Sparsegpt : public PruningMethod {
 public:
  explicit Sparsegpt(const config::Section& section)
      : section_(section),
        block_size_(section.integer_or("block_size", 128, {.low = 1, .high = 65536})),
        damping_(section.number_or("damping", 0.01, {.low = 0, .high = 100})) {}
  Needs needs() const override { return {.gram = true}; }
  bool moves_weights() const override { return true; }
  void check(const Pattern& pattern) const override {
    if (!pattern.unstructured() && block_size_ % pattern.group != 0)
      section_.fail("block_size", fmt::format("{} is not a multiple of the {} columns of a group",
                                              block_size_, pattern.group));
  }
  void prune(BlockWork& work) override;

 private:
  config::Section section_;
  int64_t block_size_;
  double damping_;
};

void Sparsegpt::prune(BlockWork& work) {
  std::vector<int64_t> sizes;
  for (const InputStatistics& input : work.statistics)
    sizes.push_back(input.gram.defined() ? input.gram.size(0) : 0);
  auto computed = once_per_input(sizes, work.workers(), work.group(), [&](int64_t input) {
    at::Tensor gram = work.take_gram(input);
    linalg::FactorReport report;
    const at::Tensor factor = linalg::inverse_factor(
        gram, damping_, fmt::format("block {} input {}", work.block, input), report);
    return Computed{{factor},
                    {{"damping", report.damping},
                     {"raised", report.times_raised},
                     {"dead", report.dead_inputs}}};
  });
  std::vector<at::Tensor> factors(computed.size());
  std::vector<std::vector<int64_t>> dead_inputs(computed.size());
  double largest = 0;
  for (size_t input = 0; input < computed.size(); ++input) {
    if (sizes[input] == 0) continue;
    const nlohmann::json& report = computed[input].report;
    factors[input] = computed[input].tensors[0];
    dead_inputs[input] = report["dead"].get<std::vector<int64_t>>();
    const double damping = report["damping"].get<double>();
    largest = std::max(largest, damping);
    if (report["raised"].get<int>() > 0)
      work.context.progress.say(
          fmt::format("block {}: damping raised to {} for input {}, its Gram is not "
                      "positive definite with less",
                      work.block, damping, input));
    if (!work.keep_statistics) work.statistics[input].gram = at::Tensor();
  }
  work.report["damping"] = largest;
  prune_sparsegpt(work.tasks, factors, dead_inputs, block_size_, work.keep_zeros, work.workers(),
                  work.group());
}

const MethodRegistration registration{
    "sparsegpt",
    [](const config::Section& section) { return std::make_unique<Sparsegpt>(section); },
    {"block_size"}};

}  // namespace

void prune_sparsegpt(std::span<MatrixTask> tasks, std::span<const at::Tensor> factors,
                     std::span<const std::vector<int64_t>> dead_inputs, int64_t block_size,
                     bool keep_zeros, Workers& workers, const comm::Communicator& group) {
  Solver solver{tasks,
                factors,
                dead_inputs,
                block_size,
                keep_zeros,
                workers,
                group,
                tiles_of_rank(tasks, group.rank(), group.size()),
                std::vector<Workspace>(workers.count())};
  check(solver);
  solver.solve_groups();
  solver.solve_unstructured();
}

}  // namespace espalier::prune
