// Which heads DSEE removes, and what the removal leaves on disk.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "pipeline/errors.h"
#include "stages/prune/criterion.h"
#include "stages/prune/head_removal.h"

namespace espalier::prune {
namespace {

constexpr int64_t kSize = 3, kIn = 7;

/// q has four heads, v two.
struct Attention {
  Judged q, v;
  model::BlockHeads heads = model::block_heads({0, 1, 2, 3}, 4, 2);

  Attention() {
    at::manual_seed(8);
    const auto judged = [](const std::string& name, int64_t rows) {
      const model::AddedTerms terms{at::randn({2, kIn}), at::randn({rows, 2}), 2.0,
                                    at::tensor({int64_t{1}, int64_t{30}}), at::tensor({9.f, 4.f})};
      return Judged{name, at::randn({rows, kIn}), terms};
    };
    q = judged("q.weight", 4 * kSize);
    v = judged("v.weight", 2 * kSize);
  }
};

double quantity(const Judged& matrix, Criterion criterion, int64_t i, int64_t j) {
  double change = 0;
  for (int64_t k = 0; k < 2; ++k)
    change += 2.0 * matrix.terms->up[i][k].item<double>() * matrix.terms->down[k][j].item<double>();
  for (int64_t p = 0; p < 2; ++p)
    if (matrix.terms->positions[p].item<int64_t>() == i * kIn + j)
      change += matrix.terms->values[p].item<double>();
  const double weight = matrix.weight[i][j].item<double>();
  if (criterion == Criterion::delta) return std::abs(change);
  return std::abs(criterion == Criterion::merged ? weight + change : weight);
}

TEST(Heads, AScoreIsTheSumOverItsRowsOfQAndTheRowsOfVThatItReads) {
  const Attention attention;
  for (const Criterion criterion : {Criterion::delta, Criterion::merged, Criterion::magnitude}) {
    const auto found = judged_heads(criterion, attention.q, attention.v, attention.heads, kSize, 1);
    for (int64_t head = 0; head < 4; ++head) {
      double expected = 0;
      for (int64_t row = 0; row < kSize; ++row)
        for (int64_t j = 0; j < kIn; ++j)
          expected += quantity(attention.q, criterion, head * kSize + row, j) +
                      quantity(attention.v, criterion, head / 2 * kSize + row, j);
      EXPECT_NEAR(found[head], expected, 1e-4 * expected) << head;
    }
  }
}

TEST(Heads, RandomScoresBelongToTheHeadsNumberWhateverLeftBefore) {
  const Attention attention;
  const auto all =
      judged_heads(Criterion::random, attention.q, attention.v, attention.heads, kSize, 1);
  const auto left = judged_heads(Criterion::random, attention.q, attention.v,
                                 model::block_heads({0, 3}, 4, 2), kSize, 1);
  EXPECT_EQ(left, (std::vector<double>{all[0], all[3]}));
  EXPECT_NE(all[0], all[1]);
}

TEST(Heads, TheLowestGoAndTiesFallToTheLowerHead) {
  EXPECT_EQ(lowest({3, 1, 2, 1, 1}, 2), (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(lowest({3, 1, 2, 1, 1}, 4), (std::vector<int64_t>{1, 2, 3, 4}));
  EXPECT_EQ(lowest({0, 0, 0}, 1), (std::vector<int64_t>{0}));
}

TEST(Heads, NothingBesideQAndVIsNoGroundToJudgeHeadsByTheirChange) {
  Attention attention;
  attention.q.terms.reset();
  EXPECT_NO_THROW(
      judged_heads(Criterion::delta, attention.q, attention.v, attention.heads, kSize, 1));
  attention.v.terms.reset();
  EXPECT_NO_THROW(
      judged_heads(Criterion::magnitude, attention.q, attention.v, attention.heads, kSize, 1));
  try {
    judged_heads(Criterion::merged, attention.q, attention.v, attention.heads, kSize, 1);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("merge: beside"), std::string::npos) << error.what();
  }
}

TEST(Heads, AtLeastOneStaysInEveryBlock) {
  model::Architecture a;
  a.blocks = 2;
  a.heads = a.key_value_heads = 4;
  a.kept_heads = {{0, 1, 2, 3}, {1, 3}};
  EXPECT_NO_THROW(require_heads(a, 1));
  try {
    require_heads(a, 2);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("2 heads would go from block 1, which has 2"),
              std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace espalier::prune
