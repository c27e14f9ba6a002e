#pragma once
/// The sequences of a retraining, whatever the set holds: text and instructions, where the next
/// token is learnt, or labelled rows of a classification or regression.

#include <cstdint>
#include <optional>
#include <vector>

#include "pipeline/data/sampler.h"
#include "pipeline/data/token_set.h"
#include "stages/retrain/adapted_model.h"

namespace espalier::retrain {

class TrainingData {
 public:
  /// `part`: those held out for validation, or the rest. Throws UserError when the set cannot give
  /// sequences of that length.
  TrainingData(const data::TokenSet& set, uint64_t seed, int64_t sequence_length,
               bool train_on_prompt, data::HeldOut part = {});

  const data::TokenSet& set() const { return set_; }
  bool labelled() const { return set_.is_classification(); }
  /// Rows of logits of a labelled set: its classes, or one number.
  int64_t logits() const { return set_.classes() == 0 ? 1 : set_.classes(); }
  model::Problem problem() const {
    return set_.classes() == 0 ? model::Problem::regression : model::Problem::classification;
  }
  /// Of an epoch, or all of those held out.
  int64_t epoch_sequences() const;
  /// Sequences [first, first + count), padded to the longest of them. Training sees every example
  /// once an epoch in a new order; what is held out keeps one order.
  UnitBatch batch(int64_t first, int64_t count) const;
  /// Micro-batch `unit` of the step that reads sequences [first, first + batch_size): the step's
  /// sequences by falling length, ties in their order, so that those padded to one length are
  /// alike.
  UnitBatch micro_batch(int64_t first, int64_t batch_size, int64_t unit,
                        int64_t micro_batch_size) const;
  /// Tokens of each of the step's micro-batches, padding included.
  std::vector<double> micro_batch_costs(int64_t first, int64_t batch_size,
                                        int64_t micro_batch_size) const;
  /// Of a labelled sequence.
  double label(int64_t sequence) const;

 private:
  int64_t tokens(int64_t sequence) const;
  UnitBatch batch(const std::vector<int64_t>& sequences) const;
  /// The sequences of a step by falling length.
  std::vector<int64_t> by_length(int64_t first, int64_t batch_size) const;

  data::TokenSet set_;
  uint64_t seed_;
  data::HeldOut part_;
  std::optional<data::TrainingSampler> text_;
};

}  // namespace espalier::retrain
