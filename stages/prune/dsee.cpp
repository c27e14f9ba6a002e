#include "stages/prune/dsee.h"

#include <ATen/ATen.h>

#include <numeric>
#include <utility>

#include "pipeline/linalg/selection.h"
#include "stages/prune/kernels.h"
#include "stages/prune/projection.h"
#include "stages/prune/tile_access.h"
#include "stages/prune/zeros.h"

namespace espalier::prune {
namespace {

/// The tile's scores, [rows, columns].
std::vector<float> scores_of(const MatrixTask& task, const Terms& terms, const TileView& view,
                             const Tile& tile, const DseeRule& rule) {
  const bool judged = changes_matrix(terms);
  const at::Tensor quantity = judged_rows(judged ? rule.criterion : Criterion::magnitude, task.name,
                                          task.weight, terms, rule.seed, tile.first, tile.rows)
                                  .contiguous();
  const float* values = quantity.const_data_ptr<float>();
  std::vector<float> score(values, values + view.size);
  if (rule.keep_zeros) put_zeros_first(view, score.data());
  return score;
}

/// One walk's share of a unit: its scores go to the selection of their group.
void add_unit(JudgedMatrices unit, int64_t first_part, const DseeRule& rule,
              std::span<linalg::StreamedSelection> selections, Workers& workers,
              const comm::Communicator& group) {
  const auto tiles = tiles_of_rank(unit.tasks, group.rank(), group.size());
  for_each_tile(
      unit.tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t, int) {
        const Terms& terms = unit.terms[tile.task];
        selections[changes_matrix(terms) ? 0 : 1].add(
            first_part + tile.task, scores_of(unit.tasks[tile.task], terms, view, tile, rule));
      });
}

void note_groups(const JudgedMatrices& unit, DseeLosses& losses) {
  for (size_t t = 0; t < unit.tasks.size(); ++t) {
    auto& group = changes_matrix(unit.terms[t]) ? losses.with_terms : losses.without_terms;
    ++group.matrices;
    group.weights += unit.tasks[t].weight.numel();
  }
}

}  // namespace

DseeLosses count_dsee_losses(std::span<const int64_t> sizes,
                             const std::function<JudgedMatrices(int64_t unit)>& matrices,
                             const DseeRule& rule, Workers& workers,
                             const comm::Communicator& group,
                             const std::function<void(int64_t done)>& after_unit) {
  using linalg::StreamedSelection;
  const auto units = static_cast<int64_t>(sizes.size());
  const int64_t parts = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  StreamedSelection selections[2] = {StreamedSelection(parts, rule.sparsity),
                                     StreamedSelection(parts, rule.sparsity)};
  DseeLosses losses;
  for (int pass = 0; pass < StreamedSelection::kPasses; ++pass) {
    int64_t first_part = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      JudgedMatrices judged = matrices(unit);
      if (pass == 0) note_groups(judged, losses);
      add_unit(std::move(judged), first_part, rule, selections, workers, group);
      first_part += sizes[unit];
      after_unit(pass * units + unit + 1);
    }
    for (StreamedSelection& selection : selections) selection.finish_pass(group);
  }
  const std::vector<int64_t> first = selections[0].counts(), second = selections[1].counts();
  losses.with_terms.lost = std::accumulate(first.begin(), first.end(), int64_t{0});
  losses.without_terms.lost = std::accumulate(second.begin(), second.end(), int64_t{0});
  size_t part = 0;
  for (const int64_t size : sizes) {
    auto& of_unit = losses.count.emplace_back();
    for (int64_t t = 0; t < size; ++t, ++part) of_unit.push_back(first[part] + second[part]);
  }
  return losses;
}

void prune_dsee(std::span<MatrixTask> tasks, std::span<const Terms> terms,
                std::span<const int64_t> count, const DseeRule& rule, Workers& workers,
                const comm::Communicator& group) {
  check_tasks(tasks);
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  std::vector<std::vector<float>> score(tiles.size());
  for_each_tile(tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t i, int) {
    require_finite(tasks[tile.task], view, "before pruning");
    score[i] = scores_of(tasks[tile.task], terms[tile.task], view, tile, rule);
  });
  mark_smallest_of_matrices(tasks, tiles, score, count, workers, group);
  for_each_tile(tasks, tiles, workers, [&](const TileView& view, const Tile&, int64_t, int) {
    if (rule.keep_zeros) mark_zeros(view);
    apply_mask(view.weights, view.pruned, view.size);
  });
}

}  // namespace espalier::prune
