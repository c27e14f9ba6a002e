#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "stages/prune/kernels.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/method.h"
#include "stages/prune/tile_access.h"
#include "stages/prune/zeros.h"

namespace espalier::prune {
namespace {

constexpr double kTolerance = 0.001;  // of the sparsity, and the narrowest bracket of alpha

class Wanda : public PruningMethod {
 public:
  explicit Wanda(const config::Section& section)
      : section_(section), cumulative_(section.flag_or("variant", false)) {}
  Needs needs() const override { return {.norms = true}; }
  void check(const Pattern& pattern) const override {
    if (cumulative_ && !pattern.unstructured())
      section_.fail("variant",
                    fmt::format("true chooses how many weights of a row go, and pattern \"{}\" "
                                "fixes it; choose pattern unstructured or variant false",
                                pattern.name()));
  }
  std::optional<int64_t> zeros(const Pattern& pattern, int64_t rows,
                               int64_t columns) const override {
    if (!pattern.unstructured()) return PruningMethod::zeros(pattern, rows, columns);
    if (cumulative_) return std::nullopt;
    return rows * pattern.removed_of(columns);
  }
  void prune(BlockWork& work) override {
    std::vector<std::vector<float>> norms;
    for (const InputStatistics& input : work.statistics) norms.push_back(input.norms);
    const auto pruning = cumulative_ ? prune_wanda_cumulative : prune_wanda;
    pruning(work.tasks, norms, work.keep_zeros, work.workers(), work.group());
    if (cumulative_) tell_what_was_missed(work);
  }

 private:
  static void tell_what_was_missed(const BlockWork& work);

  config::Section section_;
  bool cumulative_;
};

const MethodRegistration registration{
    "wanda",
    [](const config::Section& section) { return std::make_unique<Wanda>(section); },
    {"variant"}};

void check_norms(std::span<const MatrixTask> tasks, std::span<const std::vector<float>> norms) {
  check_tasks(tasks);
  for (const MatrixTask& task : tasks)
    if (static_cast<int64_t>(norms[task.statistic].size()) != task.weight.size(1))
      throw DefectError(fmt::format("{}: {} input norms for {} inputs", task.name,
                                    norms[task.statistic].size(), task.weight.size(1)));
}

void mark_tile(const Pattern& pattern, const float* score, const TileView& view) {
  if (pattern.unstructured())
    mark_smallest_in_rows(score, view.rows, view.columns, pattern.removed_of(view.columns),
                          view.pruned);
  else
    mark_smallest_in_groups(score, view.rows, view.columns, pattern, view.pruned);
}

/// A tile's scores and, row by row, the running sums of its ascending scores.
struct ScoredTile {
  std::vector<float> score;
  std::vector<double> running;
};

ScoredTile score_tile(const TileView& view, const float* norm, bool keep_zeros) {
  ScoredTile tile{std::vector<float>(view.size), std::vector<double>(view.size)};
  scores(view.weights, norm, view.rows, view.columns, tile.score.data());
  if (keep_zeros) put_zeros_first(view, tile.score.data());
  std::vector<float> ascending(view.columns);
  for (int64_t row = 0; row < view.rows; ++row) {
    const float* from = tile.score.data() + row * view.columns;
    ascending.assign(from, from + view.columns);
    std::sort(ascending.begin(), ascending.end());
    double sum = 0;
    for (int64_t j = 0; j < view.columns; ++j)
      tile.running[row * view.columns + j] = sum += ascending[j];
  }
  return tile;
}

/// How many scores of a row go at `alpha`.
int64_t count_in_row(const ScoredTile& tile, int64_t row, int64_t columns, double alpha) {
  const auto first = tile.running.begin() + row * columns, last = first + columns;
  return std::upper_bound(first, last, alpha * *(last - 1)) - first;
}

/// The sparsity that a matrix gets at `alpha`, over all ranks.
double sparsity_at(double alpha, const MatrixTask& task, std::span<const Tile> tiles,
                   std::span<const ScoredTile> scored, const comm::Communicator& group) {
  const int64_t columns = task.weight.size(1);
  int64_t count = 0;
  for (size_t i = 0; i < tiles.size(); ++i)
    for (int64_t row = 0; row < tiles[i].rows; ++row)
      count += count_in_row(scored[i], row, columns, alpha);
  group.all_reduce_sum(std::span<int64_t>(&count, 1));
  return static_cast<double>(count) / static_cast<double>(task.weight.numel());
}

double bisect_alpha(const MatrixTask& task, std::span<const Tile> tiles,
                    std::span<const ScoredTile> scored, const comm::Communicator& group) {
  double alpha = 0.4, low = 0, high = 0.8;
  for (;;) {
    const double sparsity = sparsity_at(alpha, task, tiles, scored, group);
    if (std::abs(sparsity - task.pattern.sparsity) <= kTolerance || high - low < kTolerance)
      return alpha;
    (sparsity > task.pattern.sparsity ? high : low) = alpha;
    alpha = (low + high) / 2;
  }
}

/// The bisection also ends where its bracket does, far from what was asked.
void Wanda::tell_what_was_missed(const BlockWork& work) {
  std::vector<int64_t> lost(work.tasks.size());
  for (const Tile& tile : tiles_of_rank(work.tasks, work.group().rank(), work.group().size())) {
    const TileView view = view_of(work.tasks[tile.task], tile);
    lost[tile.task] += std::count(view.pruned, view.pruned + view.size, uint8_t{1});
  }
  work.group().all_reduce_sum(std::span(lost));
  const auto reached = [&](size_t t) {
    return static_cast<double>(lost[t]) / static_cast<double>(work.tasks[t].weight.numel());
  };
  size_t furthest = 0;
  int64_t missed = 0;
  for (size_t t = 0; t < lost.size(); ++t) {
    const auto distance = [&](size_t i) {
      return std::abs(reached(i) - work.tasks[i].pattern.sparsity);
    };
    missed += distance(t) > kTolerance;
    if (distance(t) > distance(furthest)) furthest = t;
  }
  if (missed > 0)
    work.context.progress.say(fmt::format(
        "block {}: prune.variant misses the sparsity of {} of {} matrices, most that of {}: {:.4f} "
        "where {} is asked (alpha stays within 0.8)",
        work.block, missed, lost.size(), work.tasks[furthest].name, reached(furthest),
        work.tasks[furthest].pattern.sparsity));
}

}  // namespace

void prune_wanda(std::span<MatrixTask> tasks, std::span<const std::vector<float>> norms,
                 bool keep_zeros, Workers& workers, const comm::Communicator& group) {
  check_norms(tasks, norms);
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  std::vector<std::vector<float>> score(workers.count());
  for_each_tile(
      tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t, int worker) {
        const MatrixTask& task = tasks[tile.task];
        require_finite(task, view, "before pruning");
        auto& buffer = score[worker];
        buffer.resize(view.size);
        scores(view.weights, norms[task.statistic].data(), view.rows, view.columns, buffer.data());
        if (keep_zeros) put_zeros_first(view, buffer.data());
        mark_tile(task.pattern, buffer.data(), view);
        if (keep_zeros) mark_zeros(view);
        apply_mask(view.weights, view.pruned, view.size);
      });
}

void prune_wanda_cumulative(std::span<MatrixTask> tasks, std::span<const std::vector<float>> norms,
                            bool keep_zeros, Workers& workers, const comm::Communicator& group) {
  check_norms(tasks, norms);
  const auto all = tiles_of_rank(tasks, group.rank(), group.size());
  for (size_t t = 0; t < tasks.size(); ++t) {
    MatrixTask& task = tasks[t];
    if (!task.pattern.unstructured())
      throw UserError(fmt::format("{}: prune.variant needs pattern unstructured, not {}", task.name,
                                  task.pattern.name()));
    std::vector<Tile> tiles;
    for (const Tile& tile : all)
      if (tile.task == static_cast<int64_t>(t)) tiles.push_back({0, tile.first, tile.rows});
    const std::span<MatrixTask> one(&task, 1);
    std::vector<ScoredTile> scored(tiles.size());
    for_each_tile(one, tiles, workers, [&](const TileView& view, const Tile&, int64_t i, int) {
      require_finite(task, view, "before pruning");
      scored[i] = score_tile(view, norms[task.statistic].data(), keep_zeros);
    });
    const double alpha = bisect_alpha(task, tiles, scored, group);
    for_each_tile(one, tiles, workers, [&](const TileView& view, const Tile&, int64_t i, int) {
      for (int64_t row = 0; row < view.rows; ++row)
        mark_smallest_in_rows(scored[i].score.data() + row * view.columns, 1, view.columns,
                              count_in_row(scored[i], row, view.columns, alpha),
                              view.pruned + row * view.columns);
      if (keep_zeros) mark_zeros(view);
      apply_mask(view.weights, view.pruned, view.size);
    });
  }
}

}  // namespace espalier::prune
