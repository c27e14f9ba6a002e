#include "pipeline/data/sampler.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::data {

int64_t calibration_start(const TokenSet& set, uint64_t seed, int64_t index,
                          int64_t sequence_length) {
  set.require_stream(sequence_length);
  const CounterRandom random(seed, "calibration", static_cast<uint64_t>(index));
  return static_cast<int64_t>(random.below(0, set.stream_tokens() - sequence_length + 1));
}

at::Tensor calibration_window(const TokenSet& set, uint64_t seed, int64_t index,
                              int64_t sequence_length) {
  return set.stream(calibration_start(set, seed, index, sequence_length), sequence_length);
}

at::Tensor calibration_mask(const TokenSet& set, uint64_t seed, int64_t index,
                            int64_t sequence_length) {
  return set.stream_loss_mask(calibration_start(set, seed, index, sequence_length),
                              sequence_length);
}

Permutation::Permutation(uint64_t seed, std::string_view purpose, uint64_t stream, int64_t size)
    : seed_(seed), stream_(stream), purpose_(purpose), size_(size) {
  while ((uint64_t{1} << (2 * half_bits_)) < static_cast<uint64_t>(size)) ++half_bits_;
}

uint64_t Permutation::encrypt(uint64_t value) const {
  const CounterRandom random(seed_, purpose_, stream_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t left = value >> half_bits_, right = value & mask;
  for (uint64_t round = 0; round < 6; ++round) {
    const uint64_t mixed = random.bits(round << half_bits_ | right) & mask;
    left = std::exchange(right, left ^ mixed);
  }
  return left << half_bits_ | right;
}

int64_t Permutation::operator()(int64_t index) const {
  uint64_t value = static_cast<uint64_t>(index);
  do value = encrypt(value);
  while (value >= static_cast<uint64_t>(size_));
  return static_cast<int64_t>(value);
}

int64_t HeldOut::count(int64_t sequences) const {
  if (share <= 0) return 0;
  if (share >= 1) return sequences;
  const auto wanted = static_cast<int64_t>(std::llround(share * static_cast<double>(sequences)));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, sequences - 1));
}

int64_t example_at(HeldOut part, uint64_t seed, int64_t index, int64_t examples) {
  const int64_t held = part.count(examples);
  if (part.held && held == examples) return index;
  int64_t place = index;  // in the order that holds out the first `held`
  if (!part.held) {
    const int64_t rest = examples - held;
    const Permutation order(seed, "train.epoch", static_cast<uint64_t>(index / rest), rest);
    place = held + order(index % rest);
  }
  return held == 0 ? place : Permutation(seed, "train.held", 0, examples)(place);
}

TrainingSampler::TrainingSampler(TokenSet set, uint64_t seed, int64_t sequence_length,
                                 bool train_on_prompt, HeldOut part)
    : set_(std::move(set)),
      part_(part),
      seed_(seed),
      sequence_length_(sequence_length),
      instructions_(set_.kind() == "instruction"),
      train_on_prompt_(train_on_prompt) {
  if (!instructions_) {
    set_.require_stream(sequence_length);
  } else {
    for (int64_t d = 0; d < set_.documents(); ++d)
      if (set_.document_tokens(d) < 2)
        throw UserError(
            fmt::format("{}: example {} has {} tokens; an instruction needs two or more",
                        set_.path().string(), d, set_.document_tokens(d)));
  }
  const int64_t all = instructions_ ? set_.documents() : set_.stream_tokens() / sequence_length_;
  if (part.share > 0 && part.share < 1 && all < 2)
    throw UserError(
        fmt::format("{}: {} sequence of {} tokens cannot be shared between training "
                    "and validation; give more text or a shorter sequence_length",
                    set_.path().string(), all, sequence_length));
}

int64_t TrainingSampler::epoch_sequences() const {
  const int64_t all = instructions_ ? set_.documents() : set_.stream_tokens() / sequence_length_;
  return part_.held ? part_.count(all) : all - part_.count(all);
}

/// Windows held out are the last ones of the stream, one behind the other; training draws its own
/// from what stands before them.
TrainingSampler::Row TrainingSampler::window(int64_t sequence) const {
  const int64_t held = part_.count(set_.stream_tokens() / sequence_length_);
  const int64_t rest = set_.stream_tokens() - held * sequence_length_;
  int64_t begin = rest + sequence * sequence_length_;
  if (part_.held && part_.share >= 1) begin = sequence * sequence_length_;
  if (!part_.held) {
    const CounterRandom random(seed_, "train.window", static_cast<uint64_t>(sequence));
    begin = static_cast<int64_t>(random.below(0, rest - sequence_length_ + 1));
  }
  return {set_.stream(begin, sequence_length_),
          train_on_prompt_ ? at::ones({sequence_length_}, at::kBool)
                           : set_.stream_loss_mask(begin, sequence_length_)};
}

TrainingSampler::Row TrainingSampler::row(int64_t sequence) const {
  if (!instructions_) return window(sequence);
  const int64_t document = example_at(part_, seed_, sequence, set_.documents());
  const int64_t length = std::min(sequence_length_, set_.document_tokens(document));
  return {set_.document(document, 0, length),
          train_on_prompt_ ? at::ones({length}, at::kBool) : set_.loss_mask(document, 0, length)};
}

int64_t TrainingSampler::tokens(int64_t sequence) const {
  if (!instructions_) return sequence_length_;
  const int64_t document = example_at(part_, seed_, sequence, set_.documents());
  return std::min(sequence_length_, set_.document_tokens(document));
}

Batch TrainingSampler::batch(int64_t first, int64_t count) const {
  std::vector<int64_t> sequences(count);
  std::iota(sequences.begin(), sequences.end(), first);
  return batch(sequences);
}

Batch TrainingSampler::batch(std::span<const int64_t> sequences) const {
  const auto count = static_cast<int64_t>(sequences.size());
  std::vector<Row> rows;
  int64_t longest = 0;
  for (const int64_t sequence : sequences) {
    rows.push_back(row(sequence));
    longest = std::max(longest, rows.back().tokens.numel());
  }
  Batch batch{at::zeros({count, longest}, at::kLong),
              at::full({count, longest}, kIgnored, at::kLong)};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = rows[i].tokens.numel();
    batch.tokens[i].narrow(0, 0, length).copy_(rows[i].tokens);
    if (length < 2) continue;
    const at::Tensor next = rows[i].tokens.narrow(0, 1, length - 1);
    const at::Tensor counts = rows[i].counts.narrow(0, 1, length - 1);
    batch.labels[i]
        .narrow(0, 0, length - 1)
        .copy_(next.masked_fill(counts.logical_not(), kIgnored));
  }
  batch.counted = batch.labels.ne(kIgnored).sum().item<int64_t>();
  return batch;
}

}  // namespace espalier::data
