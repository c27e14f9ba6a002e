// What is held out of a set: the same for a seed, never trained on, all of it measured.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>

#include "pipeline/data/sampler.h"
#include "pipeline/io/hdf5.h"

namespace espalier::data {
namespace {

/// Documents of 6 tokens, document d made of the number d; or one text of 600 tokens 0..599.
TokenSet write_set(const std::string& kind) {
  const auto file = std::filesystem::path(testing::TempDir()) / ("held_out_" + kind + ".h5");
  const bool text = kind == "text";
  const at::Tensor tokens =
      text ? at::arange(600, at::kInt)
           : at::arange(100, at::kInt).repeat_interleave(6).to(at::kInt).contiguous();
  io::Hdf5Writer writer(file);
  writer.write("/tokens", tokens);
  writer.write("/offsets", text ? at::tensor({int64_t{0}, int64_t{600}}, at::kLong)
                                : (at::arange(101, at::kLong) * 6).contiguous());
  writer.attribute("/", "kind", kind);
  writer.attribute("/", "tokenizer_checksum", std::string("x"));
  writer.attribute("/", "vocabulary_size", int64_t{1000});
  writer.attribute("/", "end_token", int64_t{-1});
  writer.commit();
  return TokenSet::open(file);
}

std::set<int64_t> tokens_seen(const TrainingSampler& sampler, int64_t sequences) {
  std::set<int64_t> seen;
  for (int64_t i = 0; i < sequences; ++i) {
    const at::Tensor tokens = sampler.batch(i, 1).tokens.contiguous();
    seen.insert(tokens.const_data_ptr<int64_t>(),
                tokens.const_data_ptr<int64_t>() + tokens.numel());
  }
  return seen;
}

TEST(HeldOut, ExamplesAreTrainedOnOrHeldOutAndEachIsOne) {
  const TokenSet set = write_set("instruction");
  const TrainingSampler train(set, 3, 6, true, {0.2, false}), held(set, 3, 6, true, {0.2, true});
  EXPECT_EQ(train.epoch_sequences(), 80);
  EXPECT_EQ(held.epoch_sequences(), 20);
  std::set<int64_t> trained = tokens_seen(train, 80);
  const std::set<int64_t> kept = tokens_seen(held, 20);
  EXPECT_EQ(trained.size(), 80u);
  EXPECT_EQ(kept.size(), 20u);
  EXPECT_EQ(trained, tokens_seen(train, 240));  // the epochs after hold the same examples
  trained.insert(kept.begin(), kept.end());
  EXPECT_EQ(trained.size(), 100u);
  EXPECT_EQ(kept, tokens_seen(TrainingSampler(set, 3, 6, true, {0.2, true}), 20));
  EXPECT_NE(kept, tokens_seen(TrainingSampler(set, 4, 6, true, {0.2, true}), 20));
}

TEST(HeldOut, TheEndOfAStreamIsHeldOutInOrder) {
  const TokenSet set = write_set("text");
  const TrainingSampler train(set, 3, 60, true, {0.3, false}), held(set, 3, 60, true, {0.3, true});
  EXPECT_EQ(train.epoch_sequences(), 7);
  EXPECT_EQ(held.epoch_sequences(), 3);
  EXPECT_LT(*tokens_seen(train, 200).rbegin(), 420);
  EXPECT_EQ(tokens_seen(held, 3).size(), 180u);
  EXPECT_EQ(held.batch(1, 1).tokens[0][0].item<int64_t>(), 480);
}

TEST(HeldOut, ASetOfItsOwnIsReadWholeAndInOrder) {
  const TokenSet text = write_set("text"), examples = write_set("instruction");
  const TrainingSampler windows(text, 3, 60, true, {1.0, true});
  EXPECT_EQ(windows.epoch_sequences(), 10);
  EXPECT_EQ(windows.batch(9, 1).tokens[0][0].item<int64_t>(), 540);
  const TrainingSampler rows(examples, 3, 6, true, {1.0, true});
  EXPECT_EQ(rows.epoch_sequences(), 100);
  EXPECT_EQ(rows.batch(41, 1).tokens[0][0].item<int64_t>(), 41);
}

}  // namespace
}  // namespace espalier::data
