#include "pipeline/data/sequence_batch.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"

namespace espalier::data {
namespace {

using Values = std::vector<int64_t>;

at::Tensor bytes(const std::vector<uint8_t>& values) {
  return at::tensor(at::ArrayRef<uint8_t>(values), at::kByte);
}
at::Tensor longs(const Values& values) {
  return at::tensor(at::ArrayRef<int64_t>(values), at::kLong);
}

Values values(const at::Tensor& t) {
  const at::Tensor whole = t.to(at::kLong).contiguous();
  return {whole.const_data_ptr<int64_t>(), whole.const_data_ptr<int64_t>() + whole.numel()};
}

/// Three rows of 3, 1 and 2 tokens; what a test wants otherwise it changes.
struct Written {
  std::string kind = "glue", task = "RTE", names = "yes\nno";
  int64_t classes = 2, shots = 0;
  Values offsets = {0, 3, 4, 6}, labels = {1, 0, 1}, choice_of = {0, 0, 1}, characters = {4, 2, 7};
  std::vector<float> numbers = {};
  std::vector<uint8_t> types = {0, 0, 1, 0, 0, 1}, mask = {0, 0, 1, 1, 0, 1};

  std::filesystem::path write() const {
    const auto file = std::filesystem::path(testing::TempDir()) / "labelled.h5";
    io::Hdf5Writer writer(file);
    writer.write("/tokens", at::arange(1, 7, at::kInt));
    writer.write("/offsets", longs(offsets));
    if (numbers.empty())
      writer.write("/labels", longs(labels));
    else
      writer.write("/labels", at::tensor(at::ArrayRef<float>(numbers)));
    if (kind == "glue") {
      writer.write("/token_types", bytes(types));
      writer.attribute("/", "task", task);
      writer.attribute("/", "classes", classes);
      if (!names.empty()) writer.attribute("/", "label_names", names);
    } else {
      writer.write("/loss_mask", bytes(mask));
      writer.write("/choice_of", longs(choice_of));
      writer.write("/characters", longs(characters));
      writer.attribute("/", "shots", shots);
    }
    writer.attribute("/", "kind", kind);
    writer.attribute("/", "tokenizer_checksum", std::string("abc"));
    writer.attribute("/", "vocabulary_size", int64_t{10});
    writer.attribute("/", "end_token", int64_t{9});
    writer.commit();
    return file;
  }
  std::string refusal() const {
    try {
      TokenSet::open(write());
    } catch (const UserError& error) {
      return error.what();
    }
    return "accepted";
  }
};

TEST(SequenceBatch, RowsArePaddedBehindAndKeepTypesAndLabels) {
  const TokenSet set = TokenSet::open(Written{}.write());
  EXPECT_EQ(set.task(), "RTE");
  EXPECT_EQ(set.label_names(), (std::vector<std::string>{"yes", "no"}));
  const SequenceBatch batch = sequence_batch(set, Values{2, 0});
  EXPECT_EQ(values(batch.tokens), (Values{5, 6, 0, 1, 2, 3}));
  EXPECT_EQ(values(batch.token_types), (Values{0, 1, 0, 0, 0, 1}));
  EXPECT_EQ(values(batch.visible), (Values{2, 3}));
  EXPECT_EQ(values(batch.labels), (Values{1, 1}));
  EXPECT_EQ(batch.labels.scalar_type(), at::kLong);
}

TEST(SequenceBatch, LabelsOfARegressionAreNumbers) {
  Written written{.task = "STS-B", .names = "", .classes = 0, .numbers = {0.5f, 5, 3.25f}};
  const SequenceBatch batch = sequence_batch(TokenSet::open(written.write()), Values{1, 2});
  EXPECT_EQ(batch.labels.scalar_type(), at::kDouble);
  EXPECT_EQ(batch.labels[1].item<double>(), 3.25);
}

TEST(SequenceBatch, ALongerRowIsRefusedWithTheWayOut) {
  const TokenSet set = TokenSet::open(Written{}.write());
  EXPECT_NO_THROW(require_rows(set, 3));
  try {
    require_rows(set, 2);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("row 0 has 3 tokens"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("--length 2"), std::string::npos);
  }
}

TEST(SequenceBatch, UnitsTakeRowsOfLikeLengthWithinTheirTokens) {
  const Values lengths = {3, 9, 3, 4, 20, 1};
  const auto units = units_by_length(lengths, 12);
  // 20 is alone though it is too long; 9; 4 3 3 padded to 4; 1.
  EXPECT_EQ(units, (std::vector<Values>{{4}, {1}, {3, 0, 2}, {5}}));
  // 9 + 4 would be 13; 4 + 3 + 3 + 1 are 11.
  EXPECT_EQ(units_by_length(lengths, 12, /*padded=*/false),
            (std::vector<Values>{{4}, {1}, {3, 0, 2, 5}}));
}

TEST(SequenceBatch, QuestionsKnowTheirChoices) {
  Written written{.kind = "choices", .shots = 2, .labels = {1, 0}};
  const TokenSet set = TokenSet::open(written.write());
  EXPECT_EQ(set.questions(), 2);
  EXPECT_EQ(set.first_choice(1), 2);
  EXPECT_EQ(set.first_choice(2), 3);
  EXPECT_EQ(set.characters(2), 7);
  EXPECT_EQ(set.label(0), 1);
  EXPECT_EQ(set.shots(), 2);
  EXPECT_FALSE(set.is_classification());
}

TEST(SequenceBatch, DamagedLabelsAreRefusedByName) {
  EXPECT_NE((Written{.labels = {1, 0}}.refusal()).find("/labels has 2 entries for 3 rows"),
            std::string::npos);
  EXPECT_NE((Written{.labels = {1, 2, 0}}.refusal()).find("label 1 is 2"), std::string::npos);
  EXPECT_NE((Written{.classes = 3}.refusal()).find("label_names has 2 lines for 3 classes"),
            std::string::npos);
  EXPECT_NE((Written{.classes = 1}.refusal()).find("classes is 1"), std::string::npos);
  EXPECT_NE((Written{.names = "", .classes = 0, .numbers = {1, NAN, 2}}.refusal()).find("label 1"),
            std::string::npos);
  EXPECT_NE((Written{.types = {0, 0, 2, 0, 0, 1}}.refusal()).find("/token_types holds 2"),
            std::string::npos);
  Written choices{.kind = "choices", .labels = {1, 0}};
  choices.choice_of = {0, 2, 2};
  EXPECT_NE(choices.refusal().find("choice_of[1] is 2"), std::string::npos);
  choices.choice_of = {0, 0, 1};
  choices.labels = {2, 0};
  EXPECT_NE(choices.refusal().find("label 0 is 2; the question has 2 choices"), std::string::npos);
  choices.labels = {0, 0};
  choices.characters = {4, 0, 1};
  EXPECT_NE(choices.refusal().find("characters[1] is 0"), std::string::npos);
}

}  // namespace
}  // namespace espalier::data
