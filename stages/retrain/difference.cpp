#include "stages/retrain/difference.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "pipeline/linalg/product.h"

namespace espalier::retrain {

namespace {

constexpr int64_t kChunk = 64;  // rows of logits that are held at once

model::UnitShape shape_of(const UnitBatch& batch) {
  model::UnitShape shape;
  shape.sequences = batch.tokens.size(0);
  shape.length = batch.tokens.size(1);
  shape.visible = batch.visible;
  if (batch.token_types.defined()) shape.token_types = batch.token_types.reshape({-1});
  return shape;
}

/// The units' last hidden states by the files, block after block.
std::vector<at::Tensor> run_written(const AdaptedModel& model, const io::Checkpoint& written,
                                    const std::vector<UnitBatch>& units, Workers& workers) {
  const model::Architecture& a = model.architecture();
  const auto count = static_cast<int64_t>(units.size());
  std::vector<at::Tensor> hidden(units.size());
  const model::Ends ends = model::load_ends(written, a, model.dtype());
  workers.for_each(count, [&](int64_t i, int) {
    const at::NoGradGuard no_grad;
    hidden[i] = model::embed(a, ends, units[i].tokens.reshape({-1}), shape_of(units[i]));
  });
  for (int64_t b = 0; b < a.blocks; ++b) {
    const model::BlockWeights block = model::load_block(written, a, b, model.dtype());
    workers.for_each(count, [&](int64_t i, int) {
      const at::NoGradGuard no_grad;
      const model::UnitShape shape = shape_of(units[i]);
      hidden[i] = model::block_forward(a, block, hidden[i], shape,
                                       model::rotary_table(a, shape.length), model::plain_linear());
    });
  }
  for (at::Tensor& h : hidden) h = model::finish(a, ends, h);
  return hidden;
}

/// Adds what one chunk of logits [rows, classes] differs by.
void compare_logits(const at::Tensor& trained, const at::Tensor& written, Difference& difference) {
  const at::Tensor largest = (trained - written).abs().max();
  difference.largest_logit = std::max(difference.largest_logit, largest.item<double>());
  difference.positions += trained.size(0);
  if (trained.size(1) < 2) return;
  const at::Tensor p = at::log_softmax(trained.to(at::kDouble), 1);
  const at::Tensor q = at::log_softmax(written.to(at::kDouble), 1);
  difference.mean_kl += (p.exp() * (p - q)).sum().item<double>();
}

struct Heads {
  at::Tensor trained, written;                             // output embeddings
  at::Tensor trained_bias, written_bias;                   // and their biases, or
  std::optional<model::SequenceHead> head;                 // a head with
  std::vector<at::Tensor> trained_values, written_values;  // its tensors
};

Heads heads_of(const AdaptedModel& model, const io::Checkpoint& written) {
  Heads heads;
  if (!model.head()) {
    const model::Ends trained = model.ends();
    const model::Ends ends = model::load_ends(written, model.architecture(), model.dtype());
    heads.trained = trained.head, heads.trained_bias = trained.head_bias;
    heads.written = ends.head, heads.written_bias = ends.head_bias;
    return heads;
  }
  heads.head = model.head();
  heads.trained_values = model.head_parameters();
  heads.written_values =
      model::load_sequence_head(written, model.architecture(), model.head()->labels, 0).values();
  return heads;
}

/// The sums of one unit; mean_kl is a sum still.
Difference compare_unit(const Heads& heads, const UnitBatch& unit, const at::Tensor& trained,
                        const at::Tensor& written) {
  const at::NoGradGuard no_grad;
  Difference difference;
  if (heads.head) {
    const model::UnitShape shape = shape_of(unit);
    compare_logits(model::sequence_logits(*heads.head, heads.trained_values, trained, shape),
                   model::sequence_logits(*heads.head, heads.written_values, written, shape),
                   difference);
    return difference;
  }
  for (int64_t first = 0; first < trained.size(0); first += kChunk) {
    const int64_t rows = std::min(kChunk, trained.size(0) - first);
    const auto logits = [&](const at::Tensor& hidden, const at::Tensor& head,
                            const at::Tensor& bias) {
      const at::Tensor product =
          linalg::product(hidden.narrow(0, first, rows), head.t(), at::kFloat);
      return bias.defined() ? product + bias : product;
    };
    compare_logits(logits(trained, heads.trained, heads.trained_bias),
                   logits(written, heads.written, heads.written_bias), difference);
  }
  return difference;
}

}  // namespace

Difference difference_to_written(const AdaptedModel& model, const std::filesystem::path& directory,
                                 const std::vector<UnitBatch>& batches, uint64_t seed,
                                 Workers& workers, const comm::Communicator& group) {
  std::vector<UnitBatch> mine;
  for (size_t u = group.rank(); u < batches.size(); u += group.size()) mine.push_back(batches[u]);
  const io::Checkpoint written = io::Checkpoint::open(directory);
  const std::vector<at::Tensor> second = run_written(model, written, mine, workers);
  const Heads heads = heads_of(model, written);
  std::vector<Difference> units(mine.size());
  UnitKey key{seed, 0, 0, 1};
  key.evaluating = true;
  workers.for_each(static_cast<int64_t>(mine.size()), [&](int64_t i, int) {
    units[i] = compare_unit(heads, mine[i], model.hidden_states(mine[i], key), second[i]);
  });

  const auto all = group.all_gather(comm::bytes_of(std::span(units)));
  Difference total;
  for (size_t u = 0; u < batches.size(); ++u) {
    Difference one;
    std::memcpy(&one, all[u % group.size()].data() + u / group.size() * sizeof one, sizeof one);
    total.largest_logit = std::max(total.largest_logit, one.largest_logit);
    total.mean_kl += one.mean_kl;
    total.positions += one.positions;
  }
  if (total.positions > 0) total.mean_kl /= static_cast<double>(total.positions);
  return total;
}

}  // namespace espalier::retrain
