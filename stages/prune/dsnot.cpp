#include "stages/prune/dsnot.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstring>

#include "stages/prune/kernels.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

/// What is still open in a row.
struct Search {
  const DsnotRow& row;
  const Pattern& pattern;
  std::vector<uint8_t> may_grow, may_go;  // by the first mask, and not swapped yet

  Search(const DsnotRow& of, const Pattern& by, const uint8_t* pruned)
      : row(of), pattern(by), may_grow(pruned, pruned + of.n), may_go(may_grow) {
    for (uint8_t& mark : may_go) mark = mark == 0;
  }
  double error_of(int64_t j) const { return static_cast<double>(row.weights[j]) * row.means[j]; }

  /// The weight whose growth takes most of an error of this sign away; -1: none does.
  int64_t to_grow(double sign) const {
    int64_t best = -1;
    double most = 0;
    for (int64_t j = 0; j < row.n; ++j) {
      const double gain = sign * error_of(j);
      if (!may_grow[j] || !(gain > 0)) continue;
      const double weighted = gain / static_cast<double>(row.variances[j]);
      if (weighted > most) best = j, most = weighted;
    }
    return best;
  }
  /// The weight to prune when `grown` grows; -1: there is none.
  int64_t to_prune(double sign, int64_t grown) const {
    const bool anywhere = pattern.unstructured();
    const int64_t first = anywhere ? 0 : grown / pattern.group * pattern.group;
    const int64_t last = anywhere ? row.n : first + pattern.group;
    int64_t best = -1;
    float least = 0;
    for (int64_t j = first; j < last; ++j) {
      if (!may_go[j] || (anywhere && !(sign * error_of(j) < 0))) continue;
      const float score = std::fabs(row.weights[j]) * row.norms[j];
      if (best < 0 || score < least) best = j, least = score;
    }
    return best;
  }
};

}  // namespace

int64_t refine_row(const DsnotRow& row, const Pattern& pattern, const RefineOptions& options,
                   uint8_t* pruned) {
  Search search(row, pattern, pruned);
  double error = 0;
  for (int64_t j = 0; j < row.n; ++j)
    if (pruned[j]) error += search.error_of(j);
  int64_t swapped = 0;
  for (; swapped < options.cycles && std::abs(error) > options.threshold; ++swapped) {
    const double sign = error > 0 ? 1 : -1;
    const int64_t grown = search.to_grow(sign);
    const int64_t gone = grown < 0 ? -1 : search.to_prune(sign, grown);
    if (gone < 0) break;
    const double next = error - search.error_of(grown) + search.error_of(gone);
    if (!pattern.unstructured() && next * sign < 0) break;
    error = next;
    pruned[grown] = search.may_grow[grown] = 0;
    pruned[gone] = 1;
    search.may_go[gone] = 0;
  }
  return swapped;
}

int64_t refine_by_dsnot(std::span<MatrixTask> tasks, std::span<const uint8_t> refined,
                        std::span<const at::Tensor> dense,
                        std::span<const InputStatistics> statistics, const RefineOptions& options,
                        Workers& workers, const comm::Communicator& group) {
  std::vector<int64_t> swapped(static_cast<size_t>(workers.count()));
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  for_each_tile(
      tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t, int worker) {
        if (!refined[tile.task]) return;
        const MatrixTask& task = tasks[tile.task];
        const InputStatistics& input = statistics[task.statistic];
        const float* before = dense[tile.task].const_data_ptr<float>() + tile.first * view.columns;
        for (int64_t i = 0; i < view.rows; ++i)
          swapped[worker] += refine_row({before + i * view.columns, input.means.data(),
                                         input.variances.data(), input.norms.data(), view.columns},
                                        task.pattern, options, view.pruned + i * view.columns);
        std::memcpy(view.weights, before, static_cast<size_t>(view.size) * sizeof(float));
        apply_mask(view.weights, view.pruned, view.size);
      });
  for (size_t worker = 1; worker < swapped.size(); ++worker) swapped[0] += swapped[worker];
  group.all_reduce_sum(std::span(swapped).first(1));
  return swapped[0];
}

}  // namespace espalier::prune
