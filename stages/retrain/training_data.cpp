#include "stages/retrain/training_data.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

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

int64_t TrainingData::tokens(int64_t sequence) const {
  if (text_) return text_->tokens(sequence);
  return set_.document_tokens(data::example_at(part_, seed_, sequence, set_.documents()));
}

UnitBatch TrainingData::batch(const std::vector<int64_t>& sequences) const {
  if (text_) return text_->batch(sequences);
  std::vector<int64_t> documents;
  for (const int64_t sequence : sequences)
    documents.push_back(data::example_at(part_, seed_, sequence, set_.documents()));
  return data::sequence_batch(set_, documents);
}

UnitBatch TrainingData::batch(int64_t first, int64_t count) const {
  std::vector<int64_t> sequences(count);
  std::iota(sequences.begin(), sequences.end(), first);
  return batch(sequences);
}

std::vector<int64_t> TrainingData::by_length(int64_t first, int64_t batch_size) const {
  std::vector<std::pair<int64_t, int64_t>> lengths;
  for (int64_t sequence = first; sequence < first + batch_size; ++sequence)
    lengths.emplace_back(-tokens(sequence), sequence);
  std::sort(lengths.begin(), lengths.end());
  std::vector<int64_t> sequences;
  for (const auto& [length, sequence] : lengths) sequences.push_back(sequence);
  return sequences;
}

UnitBatch TrainingData::micro_batch(int64_t first, int64_t batch_size, int64_t unit,
                                    int64_t micro_batch_size) const {
  const std::vector<int64_t> all = by_length(first, batch_size);
  const auto begin = all.begin() + unit * micro_batch_size;
  return batch(std::vector<int64_t>(begin, begin + micro_batch_size));
}

std::vector<double> TrainingData::micro_batch_costs(int64_t first, int64_t batch_size,
                                                    int64_t micro_batch_size) const {
  const std::vector<int64_t> sequences = by_length(first, batch_size);
  std::vector<double> costs;
  for (int64_t i = 0; i < batch_size; i += micro_batch_size)
    costs.push_back(static_cast<double>(tokens(sequences[i]) * micro_batch_size));
  return costs;
}

}  // namespace espalier::retrain
