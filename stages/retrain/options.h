#pragma once
/// The keys that every retraining method shares.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/train/adamw.h"

namespace espalier::retrain {

struct RetrainOptions {
  std::string method;
  std::vector<std::string> targets;  ///< last parts of layer names; empty: every linear layer
  std::optional<double> epochs;
  std::optional<int64_t> steps;  ///< wins over epochs
  int64_t batch_size = 8;        ///< sequences of one step over all ranks
  int64_t micro_batch_size = 1;  ///< sequences of one unit
  int64_t sequence_length = 512;
  double learning_rate = 0;
  train::AdamwOptions adamw;
  std::string schedule = "linear";
  std::optional<int64_t> warmup_steps;
  double warmup_ratio = 0;
  double max_grad_norm = 1.0;    ///< 0: no clipping
  int64_t checkpoint_every = 0;  ///< steps; 0: only when asked to stop, and at the end
  bool activation_checkpointing = false;
  bool train_on_prompt = true;
  std::string merge = "masked";

  int64_t units() const { return batch_size / micro_batch_size; }
  /// Steps of the run: `steps`, or enough of them to see `epochs` times the set's sequences.
  int64_t total_steps(int64_t epoch_sequences) const;
};

/// Reads and checks the shared keys, allows those that belong to other methods, and refuses the
/// choices that no method here carries out yet. Throws UserError placed at the key.
RetrainOptions read_options(const config::Section& section);

}  // namespace espalier::retrain
