#include "stages/evaluate/score_units.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "pipeline/errors.h"

namespace espalier::evaluate {
namespace {

constexpr int64_t kHiddenStateBytes = int64_t{256} << 20;

/// A quarter of a limited memory: the rest is for the block, the head and the program.
int64_t hidden_state_bytes(const driver::RunContext& run) {
  return run.memory_bytes > 0 ? std::min(kHiddenStateBytes, run.memory_bytes / 4)
                              : kHiddenStateBytes;
}

/// The scores of `units` (global numbers), through all blocks together.
std::vector<std::vector<double>> score(driver::StageContext& context,
                                       const io::Checkpoint& checkpoint,
                                       const model::Architecture& architecture,
                                       const UnitWork& work, const std::vector<int64_t>& units,
                                       const std::function<void(int64_t)>& block_done) {
  const driver::RunContext& run = context.run;
  const auto count = static_cast<int64_t>(units.size());
  std::vector<std::vector<double>> scores(units.size());
  if (count == 0) return scores;
  std::vector<at::Tensor> hidden(units.size());
  std::vector<model::UnitShape> shapes(units.size());
  int64_t longest = 0;
  {
    const model::Ends ends = model::load_ends(checkpoint, architecture, run.dtype);
    run.workers->for_each(count, [&](int64_t i, int) {
      c10::InferenceMode guard;
      const UnitInput input = work.input(units[i]);
      shapes[i] = input.shape;
      hidden[i] = model::embed(architecture, ends, input.tokens, input.shape);
    });
  }
  for (const model::UnitShape& shape : shapes) longest = std::max(longest, shape.length);
  // A unit reads as many rows of the table as it is long.
  const model::RotaryTable rotary = model::rotary_table(architecture, longest);
  for (int64_t block = 0; block < architecture.blocks; ++block) {
    const model::BlockWeights weights =
        model::load_block(checkpoint, architecture, block, run.dtype);
    run.workers->for_each(count, [&](int64_t i, int) {
      c10::InferenceMode guard;
      hidden[i] = model::block_forward(architecture, weights, hidden[i], shapes[i], rotary,
                                       model::plain_linear());
    });
    block_done(block + 1);
  }
  const model::Ends ends = model::load_ends(checkpoint, architecture, run.dtype);
  run.workers->for_each(count, [&](int64_t i, int) {
    c10::InferenceMode guard;
    const at::Tensor x = model::finish(architecture, ends, hidden[i]);
    hidden[i] = at::Tensor();
    scores[i] = work.score(units[i], work.input(units[i]), x, ends);
  });
  return scores;
}

/// Scores as one run of numbers, each unit's behind their count.
std::vector<double> packed(const std::vector<std::vector<double>>& scores) {
  std::vector<double> all;
  for (const auto& unit : scores) {
    all.push_back(static_cast<double>(unit.size()));
    all.insert(all.end(), unit.begin(), unit.end());
  }
  return all;
}

}  // namespace

std::vector<std::vector<double>> score_units(driver::StageContext& context,
                                             const io::Checkpoint& checkpoint,
                                             const model::Architecture& architecture,
                                             const UnitWork& work) {
  const driver::RunContext& run = context.run;
  const int64_t ranks = run.group.size();
  const int64_t unit_bytes =
      work.unit_tokens * architecture.hidden * static_cast<int64_t>(c10::elementSize(run.dtype));
  const int64_t at_once =
      std::max<int64_t>(run.workers->count(), hidden_state_bytes(run) / unit_bytes);
  context.progress.start(work.what, work.units);
  std::vector<std::vector<double>> scores(static_cast<size_t>(work.units));
  for (int64_t first = 0; first < work.units; first += at_once * ranks) {
    const int64_t last = std::min(work.units, first + at_once * ranks);
    std::vector<int64_t> mine;
    for (int64_t unit = first + run.group.rank(); unit < last; unit += ranks) mine.push_back(unit);
    const std::vector<double> scored =
        packed(score(context, checkpoint, architecture, work, mine, [&](int64_t blocks) {
          context.progress.advance(first + (last - first) * blocks / (architecture.blocks + 1));
        }));
    const auto all = run.group.all_gather(comm::bytes_of(std::span(scored)));
    std::vector<size_t> read(static_cast<size_t>(ranks));
    const auto next = [&](int64_t rank) {
      double value = 0;
      std::memcpy(&value, all[rank].data() + read[rank], sizeof value);
      read[rank] += sizeof value;
      return value;
    };
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t rank = (unit - first) % ranks;
      scores[unit].resize(static_cast<size_t>(next(rank)));
      for (double& value : scores[unit]) value = next(rank);
    }
    context.progress.advance(last);
    if (driver::stop_requested(run.group)) throw Requeue("evaluate: stopped");
  }
  context.progress.finish();
  return scores;
}

}  // namespace espalier::evaluate
