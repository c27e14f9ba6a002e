#include "stages/retrain/training_data.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/data/sequence_batch.h"
#include "pipeline/errors.h"

namespace espalier::retrain {

TrainingData::TrainingData(const data::TokenSet& set, uint64_t seed, int64_t sequence_length,
                           bool train_on_prompt, data::HeldOut part)
    : set_(set), seed_(seed), part_(part) {
  if (!labelled()) {
    text_.emplace(set, seed, sequence_length, train_on_prompt, part);
    return;
  }
  data::require_rows(set, sequence_length);
  if (set.documents() < (part.share > 0 ? 2 : 1))
    throw UserError(
        fmt::format("{}: {} rows are too few to train on", set.path().string(), set.documents()));
}

int64_t TrainingData::epoch_sequences() const {
  if (text_) return text_->epoch_sequences();
  const int64_t held = part_.count(set_.documents());
  return part_.held ? held : set_.documents() - held;
}

double TrainingData::label(int64_t sequence) const {
  return set_.label(data::example_at(part_, seed_, sequence, set_.documents()));
}

UnitBatch TrainingData::batch(int64_t first, int64_t count) const {
  if (text_) return text_->batch(first, count);
  std::vector<int64_t> documents;
  for (int64_t i = 0; i < count; ++i)
    documents.push_back(data::example_at(part_, seed_, first + i, set_.documents()));
  return data::sequence_batch(set_, documents);
}

}  // namespace espalier::retrain
