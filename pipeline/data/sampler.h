#pragma once
/// Which tokens a unit of work sees: counter-random windows of the stream, or instruction rows in a
/// counter-based order. A draw depends on (seed, purpose, index) alone, so that every rank, every
/// restart and any number of workers see the same batches.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string_view>

#include "pipeline/data/token_set.h"

namespace espalier::data {

/// Label of a position that does not count in the loss.
inline constexpr int64_t kIgnored = -100;

/// Start of calibration window `index`: uniform over every window of the stream.
int64_t calibration_start(const TokenSet& set, uint64_t seed, int64_t index,
                          int64_t sequence_length);
/// int64 [sequence_length]: window `index` of `prune.samples`. Throws UserError for a short stream.
at::Tensor calibration_window(const TokenSet& set, uint64_t seed, int64_t index,
                              int64_t sequence_length);
/// bool [sequence_length], the same window's loss mask (prune.tokens: loss_mask).
at::Tensor calibration_mask(const TokenSet& set, uint64_t seed, int64_t index,
                            int64_t sequence_length);

/// A pseudo-random permutation of [0, size) that costs no memory: a Feistel network on the next
/// even power of two, walked until it lands inside.
class Permutation {
 public:
  Permutation(uint64_t seed, std::string_view purpose, uint64_t stream, int64_t size);
  int64_t operator()(int64_t index) const;

 private:
  uint64_t encrypt(uint64_t value) const;
  uint64_t seed_, stream_;
  std::string_view purpose_;
  int64_t size_;
  int half_bits_ = 1;
};

/// Sequences of one length with the token that each position has to predict.
struct Batch {
  at::Tensor tokens;    ///< int64 [sequences, length]
  at::Tensor labels;    ///< int64 [sequences, length]; labels[t] = the token at t + 1, or kIgnored
  int64_t counted = 0;  ///< labels that count
};

/// Which of a set's sequences: `share` of them are held out, the same ones for a seed. Of
/// examples, a random choice; of a stream, its end.
struct HeldOut {
  double share = 0;
  bool held = false;  ///< those held out, each once in a fixed order; otherwise the rest

  /// At least one, and not all, unless share is 0 or 1.
  int64_t count(int64_t sequences) const;
};
/// The number of the example that is `index`th of the part, among `examples`. A new order every
/// epoch where training sees them.
int64_t example_at(HeldOut part, uint64_t seed, int64_t index, int64_t examples);

/// The sequences that training sees, by their running number from the first step on.
class TrainingSampler {
 public:
  /// Instruction sets give one example a row, cut at sequence_length, in a new order every epoch;
  /// any other kind is read as a stream of windows at counter-random starts. `train_on_prompt`
  /// ignores the loss mask. Throws UserError when the set cannot give a row of two tokens.
  TrainingSampler(TokenSet set, uint64_t seed, int64_t sequence_length, bool train_on_prompt,
                  HeldOut part = {});

  /// Sequences of an epoch: the examples, or the stream cut into windows once. All of those held
  /// out.
  int64_t epoch_sequences() const;
  /// Tokens of a sequence.
  int64_t tokens(int64_t sequence) const;
  /// Sequences as one batch, right-padded to the longest (padding counts nothing and, under causal
  /// attention, changes nothing).
  Batch batch(std::span<const int64_t> sequences) const;
  /// Sequences [first, first + count).
  Batch batch(int64_t first, int64_t count) const;

 private:
  struct Row {
    at::Tensor tokens, counts;  // int64 [length], bool [length]
  };
  Row row(int64_t sequence) const;
  Row window(int64_t sequence) const;

  TokenSet set_;
  HeldOut part_;
  uint64_t seed_;
  int64_t sequence_length_;
  bool instructions_, train_on_prompt_;
};

}  // namespace espalier::data
