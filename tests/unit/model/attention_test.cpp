#include "pipeline/model/attention.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <optional>
#include <vector>

namespace espalier::model {
namespace {

struct Case {
  const char* name;
  int64_t length;
  AttentionShape shape;
  std::vector<int64_t> visible = {};
};

/// softmax(q k^T / sqrt(size)) v by ATen in float64, one mask for everything that is hidden.
at::Tensor plain(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Case& c) {
  const int64_t sequences = q.size(0) / c.length, group = c.shape.heads / c.shape.key_value_heads;
  const auto heads = [&](const at::Tensor& x, int64_t count) {
    at::Tensor y =
        x.to(at::kDouble).view({sequences, c.length, count, c.shape.head_size}).transpose(1, 2);
    return count < c.shape.heads ? y.repeat_interleave(group, 1) : y;
  };
  const at::Tensor place = at::arange(c.length);
  at::Tensor seen = at::ones({sequences, 1, c.length, c.length}, at::kBool);
  if (c.shape.causal) seen = seen & (place.unsqueeze(1) >= place);
  if (c.shape.sliding_window) seen = seen & (place.unsqueeze(1) - place < *c.shape.sliding_window);
  for (size_t i = 0; i < c.visible.size(); ++i) seen[i] = seen[i] & (place < c.visible[i]);
  at::Tensor scores =
      at::matmul(heads(q, c.shape.heads), heads(k, c.shape.key_value_heads).transpose(2, 3)) /
      std::sqrt(double(c.shape.head_size));
  scores = scores.masked_fill(seen.logical_not(), -1e30);
  return at::matmul(at::softmax(scores, 3), heads(v, c.shape.key_value_heads))
      .transpose(1, 2)
      .reshape({q.size(0), -1});
}

/// Queries before the padding; what stands behind it is nobody's concern.
at::Tensor counted(const Case& c, int64_t sequences) {
  at::Tensor mask = at::ones({sequences, c.length, 1}, at::kDouble);
  for (size_t i = 0; i < c.visible.size(); ++i)
    mask[i].narrow(0, c.visible[i], c.length - c.visible[i]).zero_();
  return mask.view({-1, 1});
}

class Attention : public testing::TestWithParam<Case> {};

TEST_P(Attention, OutputAndGradientsAreThoseOfThePlainFormulation) {
  const Case& c = GetParam();
  const int64_t sequences = 3, width = c.shape.heads * c.shape.head_size,
                narrow = c.shape.key_value_heads * c.shape.head_size;
  at::manual_seed(5);
  const auto leaf = [&](int64_t columns) {
    return at::randn({sequences * c.length, columns}).set_requires_grad(true);
  };
  const std::vector<at::Tensor> inputs = {leaf(width), leaf(narrow), leaf(narrow)};
  const at::Tensor visible = c.visible.empty() ? at::Tensor() : at::tensor(c.visible);
  const at::Tensor upstream =
      at::randn({sequences * c.length, width}, at::kDouble) * counted(c, sequences);
  const at::Tensor ours =
      attention(inputs[0], inputs[1], inputs[2], {}, {}, sequences, c.shape, visible);
  const at::Tensor theirs = plain(inputs[0], inputs[1], inputs[2], c);
  EXPECT_LT(((ours - theirs) * counted(c, sequences)).abs().max().item<double>(), 1e-5);
  const auto mine = torch::autograd::grad({ours}, inputs, {upstream.to(at::kFloat)});
  const auto plain_gradients = torch::autograd::grad({theirs}, inputs, {upstream});
  for (size_t i = 0; i < inputs.size(); ++i)
    EXPECT_LT((mine[i] - plain_gradients[i]).abs().max().item<double>(), 2e-5) << i;
  const at::NoGradGuard no_grad;
  EXPECT_TRUE(at::equal(
      attention(inputs[0], inputs[1], inputs[2], {}, {}, sequences, c.shape, visible), ours));
}

// Sequences of at most 128 tokens go as one batched product, longer ones head by head.
INSTANTIATE_TEST_SUITE_P(
    ShortAndLong, Attention,
    testing::Values(Case{"short", 30, {4, 4, 8, true, {}, 0}},
                    Case{"short_grouped", 30, {6, 2, 8, true, {}, 0}},
                    Case{"short_padded", 30, {4, 4, 8, false, {}, 0}, {30, 11, 1}},
                    Case{"short_window", 30, {4, 2, 8, true, 7, 0}},
                    Case{"several_chunks", 128, {24, 8, 8, true, {}, 0}},
                    Case{"long_grouped", 150, {6, 2, 8, true, {}, 0}},
                    Case{"long_padded", 150, {4, 4, 8, false, {}, 0}, {150, 140, 3}},
                    Case{"long_window", 150, {4, 2, 8, true, 20, 0}}),
    [](const auto& tested) { return tested.param.name; });

}  // namespace
}  // namespace espalier::model
