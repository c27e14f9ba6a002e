#include "stages/evaluate/perplexity.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pipeline/data/sampler.h"
#include "pipeline/errors.h"
#include "pipeline/model/block.h"
#include "pipeline/train/cross_entropy.h"

namespace espalier::evaluate {
namespace {

constexpr int64_t kHiddenStateBytes = int64_t{256} << 20;

/// A quarter of a limited memory: the rest is for the block, the head and the program.
int64_t hidden_state_bytes(const driver::RunContext& run) {
  return run.memory_bytes > 0 ? std::min(kHiddenStateBytes, run.memory_bytes / 4)
                              : kHiddenStateBytes;
}

/// Every label is the next token; the last position predicts nothing.
at::Tensor next_tokens(const at::Tensor& tokens) {
  at::Tensor labels = at::full_like(tokens, data::kIgnored);
  labels.narrow(0, 0, tokens.size(0) - 1).copy_(tokens.narrow(0, 1, tokens.size(0) - 1));
  return labels;
}

/// The summed loss of each of `segments` (global numbers), through all blocks together.
std::vector<double> score(driver::StageContext& context, const io::Checkpoint& checkpoint,
                          const model::Architecture& architecture, const PerplexityTask& task,
                          const std::vector<int64_t>& segments) {
  const driver::RunContext& run = context.run;
  const model::UnitShape unit{1, task.sequence_length, {}};
  const model::RotaryTable rotary = model::rotary_table(architecture, task.sequence_length);
  const auto count = static_cast<int64_t>(segments.size());
  std::vector<at::Tensor> tokens(segments.size()), hidden(segments.size());
  {
    const model::Ends ends = model::load_ends(checkpoint, architecture, run.dtype);
    run.workers->for_each(count, [&](int64_t i, int) {
      c10::InferenceMode guard;
      tokens[i] = task.set.stream(segments[i] * task.sequence_length, task.sequence_length);
      hidden[i] = model::embed(architecture, ends, tokens[i], unit);
    });
  }
  for (int64_t block = 0; block < architecture.blocks; ++block) {
    const model::BlockWeights weights =
        model::load_block(checkpoint, architecture, block, run.dtype);
    run.workers->for_each(count, [&](int64_t i, int) {
      c10::InferenceMode guard;
      hidden[i] = model::block_forward(architecture, weights, hidden[i], unit, rotary,
                                       model::plain_linear());
    });
  }
  const model::Ends ends = model::load_ends(checkpoint, architecture, run.dtype);
  std::vector<double> losses(segments.size());
  run.workers->for_each(count, [&](int64_t i, int) {
    c10::InferenceMode guard;
    const at::Tensor x = model::apply_norm(architecture, ends.final_norm, hidden[i]);
    hidden[i] = at::Tensor();
    losses[i] = train::loss_sum(x, ends.head, next_tokens(tokens[i]), false).loss;
  });
  return losses;
}

}  // namespace

int64_t segments_of(const PerplexityTask& task) {
  const int64_t whole = task.set.stream_tokens() / task.sequence_length;
  if (whole == 0 || (task.segments && *task.segments > whole))
    throw UserError(
        fmt::format("{}: {} tokens give {} segments of {}; {} are asked for. Lower segments or "
                    "sequence_length, or give more text",
                    task.set.path().string(), task.set.stream_tokens(), whole, task.sequence_length,
                    task.segments.value_or(1)));
  return task.segments.value_or(whole);
}

Perplexity measure_perplexity(driver::StageContext& context, const io::Checkpoint& checkpoint,
                              const PerplexityTask& task) {
  const driver::RunContext& run = context.run;
  const model::Architecture architecture = model::read_architecture(checkpoint);
  const int64_t total = segments_of(task), ranks = run.group.size();
  const int64_t segment_bytes = task.sequence_length * architecture.hidden *
                                static_cast<int64_t>(c10::elementSize(run.dtype));
  const int64_t at_once =
      std::max<int64_t>(run.workers->count(), hidden_state_bytes(run) / segment_bytes);
  context.progress.start("segments", total);
  std::vector<double> losses(static_cast<size_t>(total));
  for (int64_t first = 0; first < total; first += at_once * ranks) {
    const int64_t last = std::min(total, first + at_once * ranks);
    std::vector<int64_t> mine;
    for (int64_t segment = first + run.group.rank(); segment < last; segment += ranks)
      mine.push_back(segment);
    const std::vector<double> scored = score(context, checkpoint, architecture, task, mine);
    const auto all = run.group.all_gather(comm::bytes_of(std::span(scored)));
    for (int64_t segment = first; segment < last; ++segment) {
      const auto& part = all[(segment - first) % ranks];
      std::memcpy(&losses[segment], part.data() + (segment - first) / ranks * sizeof(double),
                  sizeof(double));
    }
    context.progress.advance(last);
    if (driver::stop_requested(run.group)) throw Requeue("evaluate: stopped");
  }
  Perplexity result;
  double sum = 0;  // in the order of the segments, whoever computed them
  for (int64_t segment = 0; segment < total; ++segment) {
    if (!std::isfinite(losses[segment]))
      throw NumericalError(fmt::format("evaluate: the loss of segment {} of {} is not finite",
                                       segment, task.set.path().string()));
    sum += losses[segment];
  }
  result.segments = total;
  result.tokens = total * (task.sequence_length - 1);
  result.mean_loss = sum / static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.mean_loss);
  context.progress.finish();
  return result;
}

}  // namespace espalier::evaluate
