#pragma once
/// The keys that every retraining method shares.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/train/adamw.h"
#include "stages/retrain/adapter.h"

namespace espalier::retrain {

/// Measuring while training; nothing is when neither data nor share is set.
struct ValidateOptions {
  std::optional<std::string> data;     ///< a token set of its own
  std::optional<double> share;         ///< of the training set, held out
  std::optional<int64_t> every_steps;  ///< nothing: every epoch; the last step always
  std::string metric = "loss";
  bool keep_best = true;
  int64_t patience = 0;  ///< validations without a better one that end the training; 0: none

  bool wanted() const { return data || share; }
};

struct RetrainOptions {
  std::string method;
  std::vector<std::string> targets;  ///< globs (selection.h); empty: all that the method trains
  std::optional<double> epochs;
  std::optional<int64_t> steps;  ///< wins over epochs
  int64_t batch_size = 8;        ///< sequences of one step over all ranks
  int64_t micro_batch_size = 1;  ///< sequences of one unit
  int64_t sequence_length = 512;
  double learning_rate = 0;
  std::optional<double> head_learning_rate;  ///< of a classification head
  train::AdamwOptions adamw;
  std::string schedule = "linear";
  std::optional<int64_t> warmup_steps;
  double warmup_ratio = 0;
  double max_grad_norm = 1.0;    ///< 0: no clipping
  int64_t checkpoint_every = 0;  ///< steps; 0: only when asked to stop, and at the end
  bool activation_checkpointing = false;
  bool train_on_prompt = true;
  Merge merge = Merge::masked;
  bool adapter_previous = false;            ///< goes on from the adapter beside its model
  std::optional<std::string> adapter_from;  ///< adapters.h5, or a directory with it
  std::optional<std::string> index_sets;    ///< index_sets.h5; nothing: the run's last discover
  ValidateOptions validate;

  int64_t units() const { return batch_size / micro_batch_size; }
  /// Steps of the run: `steps`, or enough of them to see `epochs` times the set's sequences.
  int64_t total_steps(int64_t epoch_sequences) const;
};

/// Reads and checks the shared keys and allows those that belong to methods. Throws UserError
/// placed at the key.
RetrainOptions read_options(const config::Section& section);

}  // namespace espalier::retrain
