#include "pipeline/model/sequence_tree.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pipeline/errors.h"
#include "pipeline/model/block.h"

namespace espalier::model {
namespace {

/// Rows of each sequence, trunk and branch, among the trees' rows.
std::vector<at::Tensor> rows_of_sequences(const std::vector<SequenceTree>& trees) {
  std::vector<at::Tensor> sequences;
  int64_t begin = 0;
  for (const SequenceTree& tree : trees) {
    int64_t branch = begin + tree.trunk;
    for (const int64_t rows : tree.branches) {
      sequences.push_back(
          at::cat({at::arange(begin, begin + tree.trunk), at::arange(branch, branch + rows)}));
      branch += rows;
    }
    begin = branch;
  }
  return sequences;
}

const std::vector<SequenceTree> kTrees = {{7, {3, 1, 5}}, {0, {4, 2}}, {130, {9, 40}}, {2, {1}}};

TEST(SequenceTree, CountsRows) {
  EXPECT_EQ(kTrees[0].rows(), 16);
  EXPECT_EQ(kTrees[0].longest(), 12);
  EXPECT_EQ(kTrees[1].rows(), 6);
}

class TreeAttention : public testing::TestWithParam<AttentionShape> {};

TEST_P(TreeAttention, GivesEverySequenceWhatItHasAlone) {
  const AttentionShape& shape = GetParam();
  at::manual_seed(3);
  int64_t rows = 0;
  for (const SequenceTree& tree : kTrees) rows += tree.rows();
  const at::Tensor q = at::randn({rows, shape.heads * shape.head_size}),
                   k = at::randn({rows, shape.key_value_heads * shape.head_size}),
                   v = at::randn({rows, shape.key_value_heads * shape.head_size});
  at::Tensor cosine, sine;
  if (shape.rotated > 0) {
    const at::Tensor angles = at::rand({200, shape.rotated / 2}) * 6;
    cosine = angles.cos(), sine = angles.sin();
  }
  const at::Tensor got = tree_attention(q, k, v, cosine, sine, kTrees, shape);
  ASSERT_EQ(got.sizes(), q.sizes());
  for (const at::Tensor& at_rows : rows_of_sequences(kTrees)) {
    const auto alone = [&](const at::Tensor& x) { return x.index_select(0, at_rows); };
    const auto part = [&](const at::Tensor& table) {
      return table.defined() ? table.narrow(0, 0, at_rows.size(0)) : table;
    };
    const at::Tensor expected =
        attention(alone(q), alone(k), alone(v), part(cosine), part(sine), 1, shape);
    EXPECT_LT((alone(got) - expected).abs().max().item<double>(), 2e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, TreeAttention,
                         testing::Values(AttentionShape{4, 4, 8, true, {}, 0},
                                         AttentionShape{4, 2, 8, true, {}, 8},
                                         AttentionShape{4, 1, 8, true, 6, 4}));

TEST(TreeAttention, RefusesToLookAhead) {
  const at::Tensor x = at::zeros({3, 8});
  EXPECT_THROW(tree_attention(x, x, x, {}, {}, {{1, {1, 1}}}, {1, 1, 8, false, {}, 0}),
               DefectError);
}

TEST(SequenceTree, LearnedPositionsGoOnFromTheTrunk) {
  Architecture a;
  a.max_positions = 200;
  a.position_offset = 2;
  Ends ends;
  ends.token_embedding = at::zeros({1, 1});
  ends.position_embedding = at::arange(202, at::kFloat).unsqueeze(1);
  UnitShape unit;
  unit.length = 5;
  unit.trees = {{2, {3, 1}}, {1, {2}}};
  const at::Tensor x = embed(a, ends, at::zeros({9}, at::kLong), unit);
  EXPECT_TRUE(at::equal(x.flatten(), at::tensor({2, 3, 4, 5, 6, 4, 2, 3, 4}, at::kFloat)));
}

}  // namespace
}  // namespace espalier::model
