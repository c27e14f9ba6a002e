#include "pipeline/data/token_set.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "pipeline/data/sampler.h"
#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"

namespace espalier::data {
namespace {

struct Written {
  std::vector<int32_t> tokens = {1, 2, 3, 4, 5, 6};
  std::vector<int64_t> offsets = {0, 3, 3, 6};
  std::vector<uint8_t> mask;
  int64_t vocabulary = 10, end_token = 9;
  std::string kind = "text";

  std::filesystem::path write(const std::string& name) const {
    const auto file = std::filesystem::path(testing::TempDir()) / (name + ".h5");
    io::Hdf5Writer writer(file);
    writer.write("/tokens", at::tensor(at::ArrayRef<int32_t>(tokens), at::kInt));
    writer.write("/offsets", at::tensor(at::ArrayRef<int64_t>(offsets), at::kLong));
    if (!mask.empty()) writer.write("/loss_mask", at::tensor(at::ArrayRef<uint8_t>(mask), at::kByte));
    writer.attribute("/", "kind", kind);
    writer.attribute("/", "tokenizer_checksum", std::string("abc"));
    writer.attribute("/", "vocabulary_size", vocabulary);
    writer.attribute("/", "end_token", end_token);
    writer.commit();
    return file;
  }
  std::string refusal(const std::string& name) const {
    try {
      TokenSet::open(write(name));
    } catch (const UserError& error) {
      return error.what();
    }
    return "accepted";
  }
};

std::vector<int64_t> values(const at::Tensor& t) {
  const at::Tensor whole = t.to(at::kLong).contiguous();
  return {whole.const_data_ptr<int64_t>(), whole.const_data_ptr<int64_t>() + whole.numel()};
}

using Values = std::vector<int64_t>;

TEST(TokenSet, AStreamIsTheDocumentsInOrderWithTheEndTokenAfterEach) {
  const TokenSet set = TokenSet::open(Written{}.write("stream"));
  EXPECT_EQ(set.stream_tokens(), 9);
  const Values whole = {1, 2, 3, 9, 9, 4, 5, 6, 9};  // the second document is empty
  EXPECT_EQ(values(set.stream(0, 9)), whole);
  for (int64_t begin = 0; begin < 9; ++begin)
    for (int64_t count = 0; begin + count <= 9; ++count)
      EXPECT_EQ(values(set.stream(begin, count)),
                Values(whole.begin() + begin, whole.begin() + begin + count));
}

TEST(TokenSet, ASingleDocumentHasNoEndTokenAdded) {
  Written written;
  written.offsets = {0, 6};
  const TokenSet set = TokenSet::open(written.write("single"));
  EXPECT_EQ(values(set.stream(0, set.stream_tokens())), (Values{1, 2, 3, 4, 5, 6}));
}

TEST(TokenSet, HostileFilesAreRefusedWithTheOffendingNumber) {
  Written written;
  written.offsets = {0, 4, 3, 6};
  EXPECT_NE(written.refusal("order").find("offsets[2] = 3 is below offsets[1] = 4"), std::string::npos);
  written.offsets = {0, 7};
  EXPECT_NE(written.refusal("last").find("the last offset is 7, but there are 6 tokens"),
            std::string::npos);
  written.offsets = {0, 6};
  written.tokens[4] = 10;
  EXPECT_NE(written.refusal("id").find("token 4 is 10, outside the vocabulary [0, 10)"),
            std::string::npos);
  written.tokens[4] = -1;
  EXPECT_NE(written.refusal("negative").find("token 4 is -1"), std::string::npos);
  written.tokens[4] = 1;
  written.mask = {1, 0};
  EXPECT_NE(written.refusal("mask").find("2 entries for 6 tokens"), std::string::npos);
}

TEST(TokenSet, ChecksumChangesWithTokensAndOffsets) {
  Written written;
  const std::string first = TokenSet::open(written.write("a")).checksum();
  EXPECT_EQ(TokenSet::open(written.write("b")).checksum(), first);
  written.tokens[0] = 2;
  EXPECT_NE(TokenSet::open(written.write("c")).checksum(), first);
  written.tokens[0] = 1;
  written.offsets = {0, 2, 3, 6};
  EXPECT_NE(TokenSet::open(written.write("d")).checksum(), first);
}

TEST(TokenSet, RefusesAnotherVocabularyAndAShortStreamWithBothNumbers) {
  const TokenSet set = TokenSet::open(Written{}.write("refuse"));
  try {
    set.require_vocabulary(11, "models/a");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("of 10 tokens, but the model models/a has 11"),
              std::string::npos);
  }
  set.require_stream(9);
  try {
    set.require_stream(16);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("holds 9 tokens, but sequence_length asks for windows of 16"),
              std::string::npos);
  }
}

TEST(Sampler, WindowsDependOnSeedAndIndexAloneAndReachBothEnds) {
  const TokenSet set = TokenSet::open(Written{}.write("windows"));
  std::set<int64_t> starts;
  for (int64_t i = 0; i < 200; ++i) {
    const int64_t start = calibration_start(set, 5, i, 4);
    EXPECT_EQ(values(calibration_window(set, 5, i, 4)), values(set.stream(start, 4)));
    starts.insert(start);
  }
  EXPECT_EQ(starts, (std::set<int64_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_THROW(calibration_start(set, 5, 0, 10), UserError);
}

TEST(Sampler, APermutationVisitsEveryIndexOnce) {
  for (int64_t size : {1, 2, 3, 16, 17, 1000}) {
    const Permutation order(3, "train.epoch", 0, size), other(3, "train.epoch", 1, size);
    std::set<int64_t> seen;
    int64_t equal = 0;
    for (int64_t i = 0; i < size; ++i) {
      seen.insert(order(i));
      equal += order(i) == other(i);
      EXPECT_GE(order(i), 0);
      EXPECT_LT(order(i), size);
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), size);
    if (size == 1000) EXPECT_LT(equal, 10);
  }
}

TEST(Sampler, InstructionRowsAreCutAndOnlyMaskedInTokensAreLabels) {
  Written written;
  written.kind = "instruction";
  written.offsets = {0, 2, 6};
  written.mask = {0, 1, 0, 0, 1, 1};
  const TrainingSampler sampler(TokenSet::open(written.write("rows")), 1, 3, false);
  EXPECT_EQ(sampler.epoch_sequences(), 2);
  const Batch batch = sampler.batch(0, 2);
  EXPECT_EQ(batch.tokens.sizes(), (at::IntArrayRef{2, 3}));
  const bool swapped = batch.tokens[0][0].item<int64_t>() == 3;
  const at::Tensor short_row = batch.labels[swapped ? 1 : 0], long_row = batch.labels[swapped ? 0 : 1];
  EXPECT_EQ(values(short_row), (Values{2, kIgnored, kIgnored}));
  EXPECT_EQ(values(long_row), (Values{kIgnored, 5, kIgnored}));  // tokens 3 4 5, cut before 6
  EXPECT_EQ(batch.counted, 2);
  EXPECT_EQ(TrainingSampler(TokenSet::open(written.write("rows")), 1, 3, true).batch(0, 2).counted, 3);
}

TEST(Sampler, ABatchIsItsSequencesWhateverTheMicroBatch) {
  Written written;
  written.tokens.resize(60);
  std::iota(written.tokens.begin(), written.tokens.end(), 0);
  written.offsets = {0, 60};
  written.vocabulary = 100;
  const TrainingSampler sampler(TokenSet::open(written.write("batch")), 1, 8, false);
  const Batch whole = sampler.batch(4, 3);
  for (int64_t i = 0; i < 3; ++i) {
    const Batch one = sampler.batch(4 + i, 1);
    EXPECT_TRUE(at::equal(whole.tokens[i], one.tokens[0]));
    EXPECT_TRUE(at::equal(whole.labels[i], one.labels[0]));
    EXPECT_TRUE(at::equal(one.labels[0].narrow(0, 0, 7), one.tokens[0].narrow(0, 1, 7)));
    EXPECT_EQ(one.labels[0][7].item<int64_t>(), kIgnored);
  }
}

}  // namespace
}  // namespace espalier::data
