#include "pipeline/data/sampler.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
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

TrainingSampler::TrainingSampler(TokenSet set, uint64_t seed, int64_t sequence_length,
                                 bool train_on_prompt)
    : set_(std::move(set)),
      seed_(seed),
      sequence_length_(sequence_length),
      instructions_(set_.kind() == "instruction"),
      train_on_prompt_(train_on_prompt) {
  if (!instructions_) {
    set_.require_stream(sequence_length);
    return;
  }
  for (int64_t d = 0; d < set_.documents(); ++d)
    if (set_.document_tokens(d) < 2)
      throw UserError(fmt::format("{}: example {} has {} tokens; an instruction needs two or more",
                                  set_.path().string(), d, set_.document_tokens(d)));
}

int64_t TrainingSampler::epoch_sequences() const {
  return instructions_ ? set_.documents() : set_.stream_tokens() / sequence_length_;
}

TrainingSampler::Row TrainingSampler::row(int64_t sequence) const {
  if (!instructions_) {
    const CounterRandom random(seed_, "train.window", static_cast<uint64_t>(sequence));
    const auto begin = static_cast<int64_t>(
        random.below(0, set_.stream_tokens() - sequence_length_ + 1));
    return {set_.stream(begin, sequence_length_),
            train_on_prompt_ ? at::ones({sequence_length_}, at::kBool)
                             : set_.stream_loss_mask(begin, sequence_length_)};
  }
  const int64_t examples = set_.documents();
  const Permutation order(seed_, "train.epoch", static_cast<uint64_t>(sequence / examples),
                          examples);
  const int64_t document = order(sequence % examples);
  const int64_t length = std::min(sequence_length_, set_.document_tokens(document));
  return {set_.document(document, 0, length), train_on_prompt_
                                                  ? at::ones({length}, at::kBool)
                                                  : set_.loss_mask(document, 0, length)};
}

Batch TrainingSampler::batch(int64_t first, int64_t count) const {
  std::vector<Row> rows;
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) {
    rows.push_back(row(first + i));
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
    batch.labels[i].narrow(0, 0, length - 1).copy_(next.masked_fill(counts.logical_not(), kIgnored));
  }
  batch.counted = batch.labels.ne(kIgnored).sum().item<int64_t>();
  return batch;
}

}  // namespace espalier::data
