#include "stages/prune/alps.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "stages/prune/kernels.h"
#include "stages/prune/method.h"
#include "stages/prune/once_per_input.h"
#include "stages/prune/projection.h"
#include "stages/prune/solver_kernels.h"
#include "stages/prune/tile_access.h"
#include "stages/prune/zeros.h"

namespace espalier::prune {
namespace {

constexpr int64_t kCheckEvery = 3;  // iterations between two looks at the mask
constexpr double kLargestRho = 1e6;
constexpr int64_t kPatience = 30;  // iterations after which a nearly resting mask is enough
constexpr double kNearlyResting = 3e-4;

/// One matrix: its penalty's schedule (published: section 3.2 and the authors' program).
struct Schedule {
  double rho = 0;
  bool active = true;
  bool started = false;  ///< the mask has moved: from now on the penalty grows
  int64_t keep = 0;      ///< unstructured: how many stay
  AlpsReport report;
  std::vector<float> inverse;  ///< 1 / (eigenvalue + rho)

  /// Takes the share of kept positions that changed since the last look; true: start again from the
  /// first mask.
  bool advance(double changed) {
    report.changed = changed;
    const bool rests =
        (started && changed == 0) || (report.iterations >= kPatience && changed < kNearlyResting);
    if (rests) {
      active = false;
      return false;
    }
    bool again = false;
    if (changed > 0.005) {
      rho *= changed > 0.1 ? 1.3 : 1.2;
      started = true;
    } else if (started) {
      rho *= 1.1;
    } else {
      rho /= 5;
      again = changed > 0;
    }
    rho = std::min(rho, kLargestRho);
    return again;
  }
};

struct TileState {
  std::vector<float> constant;           // B0 G' Q = B0 Q diag(values)
  std::vector<float> state;              // D where kept, V where pruned
  std::vector<float> solution;           // B
  std::vector<float> magnitude;          // what is projected
  std::vector<uint8_t> first, previous;  // masks: of B0, and at the last look
  bool has_zeros = false;                // of a sparse model, to be kept
};

struct Workspace {
  std::vector<float> left, right;
  GradientWorkspace gradients;
};

/// Unstructured: how many of a matrix's weights stay.
int64_t kept_of(const Pattern& pattern, int64_t entries) {
  return std::llround((1 - pattern.sparsity) * static_cast<double>(entries));
}

at::Tensor as_matrix(std::vector<float>& values, const TileView& view) {
  values.resize(static_cast<size_t>(view.size));
  return at::from_blob(values.data(), {view.rows, view.columns}, at::kFloat);
}

class Solver {
 public:
  Solver(std::span<MatrixTask> tasks, std::span<const AlpsInput> inputs, const AlpsOptions& options,
         bool keep_zeros, Workers& workers, const comm::Communicator& group)
      : tasks_(tasks),
        inputs_(inputs),
        options_(options),
        keep_zeros_(keep_zeros),
        workers_(workers),
        group_(group),
        tiles_(tiles_of_rank(tasks, group.rank(), group.size())),
        states_(tiles_.size()),
        workspaces_(static_cast<size_t>(workers.count())) {}

  std::vector<AlpsReport> solve() {
    start();
    for (int64_t iteration = 1; iteration <= options_.iterations && any_active(); ++iteration) {
      iterate();
      if (iteration % kCheckEvery == 0) look_at_masks();
    }
    finish();
    std::vector<AlpsReport> reports;
    for (const Schedule& schedule : schedules_) reports.push_back(schedule.report);
    return reports;
  }

 private:
  const AlpsInput& input_of(const Tile& tile) const { return inputs_[tasks_[tile.task].statistic]; }
  bool keeps_all(size_t task) const {
    return tasks_[task].pattern.unstructured() &&
           schedules_[task].keep == tasks_[task].weight.numel();
  }
  bool any_active() const {
    return std::any_of(schedules_.begin(), schedules_.end(),
                       [](const Schedule& schedule) { return schedule.active; });
  }
  /// body(view, tile, state, workspace) on this rank's tiles of active matrices (or of all).
  template <class Body>
  void for_tiles(bool all, const Body& body) {
    workers_.for_each(static_cast<int64_t>(tiles_.size()), [&](int64_t i, int worker) {
      const Tile& tile = tiles_[i];
      if (all || schedules_[tile.task].active)
        body(view_of(tasks_[tile.task], tile), tile, states_[i], workspaces_[worker]);
    });
  }
  void start();
  void set_rho(size_t task);
  void target(const TileView& view, const Tile& tile, std::vector<float>& out) const;
  void restart(const TileView& view, const Tile& tile, TileState& state) const;
  void project(bool all);
  void iterate();
  void look_at_masks();
  void finish();

  std::span<MatrixTask> tasks_;
  std::span<const AlpsInput> inputs_;
  const AlpsOptions& options_;
  bool keep_zeros_;
  Workers& workers_;
  const comm::Communicator& group_;
  std::vector<Tile> tiles_;
  std::vector<TileState> states_;
  std::vector<Workspace> workspaces_;
  std::vector<Schedule> schedules_;
};

void Solver::set_rho(size_t task) {
  Schedule& schedule = schedules_[task];
  schedule.report.rho = schedule.rho;
  const at::Tensor& values = inputs_[tasks_[task].statistic].values;
  schedule.inverse.resize(static_cast<size_t>(values.numel()));
  for (int64_t k = 0; k < values.numel(); ++k)
    schedule.inverse[k] = static_cast<float>(
        1 / (std::max<double>(values.const_data_ptr<float>()[k], 0) + schedule.rho));
}

// B0 of a tile.
void Solver::target(const TileView& view, const Tile& tile, std::vector<float>& out) const {
  out.resize(static_cast<size_t>(view.size));
  scale_columns(view.weights, input_of(tile).gram.scale.data(), view.rows, view.columns,
                out.data());
}

// D = the projection of B0, V = 0.
void Solver::restart(const TileView& view, const Tile& tile, TileState& state) const {
  target(view, tile, state.state);
  std::copy(state.first.begin(), state.first.end(), view.pruned);
  apply_mask(state.state.data(), view.pruned, view.size);
  state.previous = state.first;
}

void Solver::start() {
  for (size_t t = 0; t < tasks_.size(); ++t) {
    schedules_.emplace_back().rho = options_.rho;
    schedules_[t].keep = kept_of(tasks_[t].pattern, tasks_[t].weight.numel());
    schedules_[t].active = !keeps_all(t);
    set_rho(t);
  }
  for_tiles(true, [&](const TileView& view, const Tile& tile, TileState& state, Workspace& own) {
    require_finite(tasks_[tile.task], view, "before pruning");
    state.has_zeros = keep_zeros_ && std::find(view.weights, view.weights + view.size, 0.0f) !=
                                         view.weights + view.size;
    target(view, tile, state.solution);
    at::Tensor rotated = as_matrix(state.constant, view);
    linalg::product_into(rotated, as_matrix(state.solution, view), input_of(tile).vectors);
    own.left = state.constant;
    scale_columns(own.left.data(), input_of(tile).values.const_data_ptr<float>(), view.rows,
                  view.columns, state.constant.data());
    state.magnitude.resize(static_cast<size_t>(view.size));
    magnitudes(state.solution.data(), view.size, state.magnitude.data());
  });
  project(true);
  for_tiles(true, [&](const TileView& view, const Tile& tile, TileState& state, Workspace&) {
    state.first.assign(view.pruned, view.pruned + view.size);
    restart(view, tile, state);
  });
}

// The masks of what `magnitude` holds, in the active matrices or in all. Zeros of a sparse model go
// first, and also where the pattern would keep them.
void Solver::project(bool all) {
  std::vector<Tile> tiles;
  std::vector<std::vector<float>> score;
  std::vector<size_t> of;
  for (size_t i = 0; i < tiles_.size(); ++i) {
    if (!all && !schedules_[tiles_[i].task].active) continue;
    tiles.push_back(tiles_[i]);
    score.push_back(std::move(states_[i].magnitude));
    of.push_back(i);
  }
  std::vector<int64_t> count(tasks_.size());
  for (size_t t = 0; t < tasks_.size(); ++t)
    if (all || schedules_[t].active) count[t] = tasks_[t].weight.numel() - schedules_[t].keep;
  for_each_tile(tasks_, tiles, workers_, [&](const TileView& view, const Tile&, int64_t i, int) {
    if (states_[of[i]].has_zeros) put_zeros_first(view, score[i].data());
  });
  mark_smallest_of_matrices(tasks_, tiles, score, count, workers_, group_);
  for (size_t i = 0; i < tiles.size(); ++i) {
    if (states_[of[i]].has_zeros) mark_zeros(view_of(tasks_[tiles[i].task], tiles[i]));
    states_[of[i]].magnitude = std::move(score[i]);
  }
}

void Solver::iterate() {
  for_tiles(false, [&](const TileView& view, const Tile& tile, TileState& state, Workspace& own) {
    const Schedule& schedule = schedules_[tile.task];
    const auto rho = static_cast<float>(schedule.rho);
    const at::Tensor& vectors = input_of(tile).vectors;
    at::Tensor left = as_matrix(own.left, view), right = as_matrix(own.right, view),
               solution = as_matrix(state.solution, view);
    penalty_minus_dual(state.state.data(), view.pruned, rho, view.size, own.left.data());
    linalg::product_into(right, left, vectors);
    add_and_scale_columns(own.right.data(), state.constant.data(), schedule.inverse.data(),
                          view.rows, view.columns);
    linalg::product_into(solution, right, vectors.t());
    add_dual(state.solution.data(), view.pruned, rho, view.size, state.state.data(),
             state.magnitude.data());
  });
  project(false);
  for_tiles(false, [&](const TileView& view, const Tile& tile, TileState& state, Workspace&) {
    split_by_mask(state.state.data(), view.pruned, static_cast<float>(schedules_[tile.task].rho),
                  view.size);
  });
  for (Schedule& schedule : schedules_) schedule.report.iterations += schedule.active;
}

void Solver::look_at_masks() {
  const size_t count = tasks_.size();
  std::vector<int64_t> sums(2 * count);  // of each matrix: changed positions, then kept ones
  for (size_t i = 0; i < tiles_.size(); ++i) {
    const TileView view = view_of(tasks_[tiles_[i].task], tiles_[i]);
    std::vector<uint8_t>& previous = states_[i].previous;
    int64_t changed = 0, kept = 0;
    for (int64_t j = 0; j < view.size; ++j) {
      changed += previous[j] != view.pruned[j];
      kept += view.pruned[j] == 0;
    }
    std::copy(view.pruned, view.pruned + view.size, previous.begin());
    sums[tiles_[i].task] += changed;
    sums[count + tiles_[i].task] += kept;
  }
  group_.all_reduce_sum(sums);
  std::vector<bool> again(count);
  for (size_t t = 0; t < count; ++t) {
    if (!schedules_[t].active) continue;
    const auto kept = static_cast<double>(std::max<int64_t>(sums[count + t], 1));
    again[t] = schedules_[t].advance(static_cast<double>(sums[t]) / kept);
    set_rho(t);
  }
  for_tiles(false, [&](const TileView& view, const Tile& tile, TileState& state, Workspace&) {
    if (again[tile.task]) restart(view, tile, state);
  });
}

void Solver::finish() {
  for_tiles(true, [&](const TileView& view, const Tile&, TileState& state, Workspace&) {
    magnitudes(state.solution.data(), view.size, state.magnitude.data());
  });
  project(true);
  for_tiles(true, [&](const TileView& view, const Tile& tile, TileState& state, Workspace& own) {
    if (keeps_all(static_cast<size_t>(tile.task))) return;
    const SolverGram& gram = input_of(tile).gram;
    target(view, tile, own.left);
    apply_mask(state.solution.data(), view.pruned, view.size);
    conjugate_gradients(own.left.data(), view.pruned, view.rows, gram.gram, options_.gradient_steps,
                        state.solution.data(), own.gradients);
    scale_columns(state.solution.data(), gram.inverse.data(), view.rows, view.columns,
                  view.weights);
    apply_mask(view.weights, view.pruned, view.size);
    require_finite(tasks_[tile.task], view, "after ALPS");
    state = {};
  });
}

class Alps : public PruningMethod {
 public:
  explicit Alps(const config::Section& section)
      : options_{section.number_or("rho", 0.1, {.low = 0, .high = kLargestRho, .low_open = true}),
                 section.integer_or("iterations", 300, {.low = 1, .high = 1e6}),
                 section.integer_or("gradient_steps", 10, {.low = 0, .high = 1e6})},
        damping_(section.number_or("damping", 0.01, {.low = 0, .high = 100})) {}
  Needs needs() const override { return {.gram = true, .bytes_per_weight = 26}; }
  bool moves_weights() const override { return true; }
  std::optional<int64_t> zeros(const Pattern& pattern, int64_t rows,
                               int64_t columns) const override {
    if (!pattern.unstructured()) return PruningMethod::zeros(pattern, rows, columns);
    return rows * columns - kept_of(pattern, rows * columns);
  }
  void prune(BlockWork& work) override;

 private:
  AlpsOptions options_;
  double damping_;
};

void Alps::prune(BlockWork& work) {
  std::vector<int64_t> sizes(work.statistics.size());
  std::vector<ScaledGram> scaled(work.statistics.size());
  std::vector<AlpsInput> inputs(work.statistics.size());
  for (size_t i = 0; i < sizes.size(); ++i)
    if (work.statistics[i].gram.defined()) sizes[i] = work.statistics[i].gram.size(0);
  work.workers().for_each(static_cast<int64_t>(sizes.size()), [&](int64_t i, int) {
    c10::InferenceMode guard;
    if (sizes[i] == 0) return;
    scaled[i] =
        scale_gram(work.take_gram(i), damping_, fmt::format("block {} input {}", work.block, i));
    inputs[i].gram = solver_gram(scaled[i]);
  });
  auto computed = once_per_input(sizes, work.workers(), work.group(), [&](int64_t i) {
    const auto [values, vectors] = at::linalg_eigh(scaled[i].gram);
    return Computed{{vectors.to(at::kFloat).contiguous(), values.to(at::kFloat)}, {}};
  });
  scaled.clear();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) continue;
    inputs[i].vectors = computed[i].tensors[0];
    inputs[i].values = computed[i].tensors[1];
  }
  const auto reports =
      prune_alps(work.tasks, inputs, options_, work.keep_zeros, work.workers(), work.group());
  nlohmann::json& matrices = work.report["alps"];
  for (size_t t = 0; t < work.tasks.size(); ++t)
    matrices[work.tasks[t].name] = {{"iterations", reports[t].iterations},
                                    {"rho", reports[t].rho},
                                    {"changed", reports[t].changed}};
}

const MethodRegistration registration{
    "alps",
    [](const config::Section& section) { return std::make_unique<Alps>(section); },
    {"rho", "iterations", "gradient_steps"}};

}  // namespace

std::vector<AlpsReport> prune_alps(std::span<MatrixTask> tasks, std::span<const AlpsInput> inputs,
                                   const AlpsOptions& options, bool keep_zeros, Workers& workers,
                                   const comm::Communicator& group) {
  check_tasks(tasks);
  return Solver(tasks, inputs, options, keep_zeros, workers, group).solve();
}

}  // namespace espalier::prune
