#include "pipeline/train/cross_entropy.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "pipeline/data/sampler.h"
#include "pipeline/errors.h"

namespace espalier::train {
namespace {

struct Case {
  at::Tensor hidden, head, labels;
};

Case make_case(int64_t tokens, int64_t width, int64_t vocabulary, at::ScalarType type) {
  at::manual_seed(3);
  Case c{at::randn({tokens, width}).to(type), at::randn({vocabulary, width}).mul(0.3).to(type),
         at::randint(vocabulary, {tokens}, at::kLong)};
  c.labels.index_put_({at::arange(0, tokens, 5)}, at::scalar_tensor(data::kIgnored, at::kLong));
  return c;
}

at::Tensor reference(const at::Tensor& hidden, const Case& c) {
  return at::cross_entropy_loss(at::matmul(hidden, c.head.to(at::kDouble).t()), c.labels, {},
                                at::Reduction::Sum, data::kIgnored);
}

TEST(CrossEntropy, LossAndGradientAgreeWithTorchInDouble) {
  for (const int64_t tokens : {3, 256, 700}) {
    const Case c = make_case(tokens, 24, 1003, at::kFloat);
    at::Tensor hidden = c.hidden.to(at::kDouble).set_requires_grad(true);
    const at::Tensor loss = reference(hidden, c);
    loss.backward();
    const LossSum ours = loss_sum(c.hidden, c.head, c.labels, true);
    EXPECT_NEAR(ours.loss, loss.item<double>(), 2e-6 * loss.item<double>());
    EXPECT_EQ(ours.counted, c.labels.ne(data::kIgnored).sum().item<int64_t>());
    const double error = (ours.gradient.to(at::kDouble) - hidden.grad()).abs().max().item<double>();
    EXPECT_LT(error, 5e-6 * hidden.grad().abs().max().item<double>());
    EXPECT_EQ(loss_sum(c.hidden, c.head, c.labels, false).loss, ours.loss);
  }
}

TEST(CrossEntropy, TheHeadsGradientAgreesWithTorchInDouble) {
  for (const int64_t tokens : {3, 700}) {
    const Case c = make_case(tokens, 24, 503, at::kFloat);
    const at::Tensor head = c.head.to(at::kDouble).set_requires_grad(true);
    at::cross_entropy_loss(at::matmul(c.hidden.to(at::kDouble), head.t()), c.labels, {},
                           at::Reduction::Sum, data::kIgnored)
        .backward();
    const LossSum ours = loss_sum(c.hidden, c.head, c.labels, true, true);
    const double error =
        (ours.head_gradient.to(at::kDouble) - head.grad()).abs().max().item<double>();
    EXPECT_LT(error, 5e-6 * head.grad().abs().max().item<double>());
    EXPECT_FALSE(loss_sum(c.hidden, c.head, c.labels, true).head_gradient.defined());
  }
}

TEST(CrossEntropy, BFloat16GradientIsWithinItsRounding) {
  const Case c = make_case(300, 64, 2000, at::kBFloat16);
  at::Tensor hidden = c.hidden.to(at::kDouble).set_requires_grad(true);
  const at::Tensor loss = reference(hidden, c);
  loss.backward();
  const LossSum ours = loss_sum(c.hidden, c.head, c.labels, true);
  EXPECT_NEAR(ours.loss, loss.item<double>(), 1e-5 * loss.item<double>());
  EXPECT_EQ(ours.gradient.scalar_type(), at::kBFloat16);
  const at::Tensor error = (ours.gradient.to(at::kDouble) - hidden.grad()).norm();
  EXPECT_LT(error.item<double>(), 4e-3 * hidden.grad().norm().item<double>());
}

TEST(CrossEntropy, ABiasIsAddedToEveryLogit) {
  const Case c = make_case(300, 24, 503, at::kFloat);
  const at::Tensor bias = at::randn({503});
  at::Tensor hidden = c.hidden.to(at::kDouble).set_requires_grad(true);
  const at::Tensor logits = at::matmul(hidden, c.head.to(at::kDouble).t()) + bias.to(at::kDouble);
  const at::Tensor loss =
      at::cross_entropy_loss(logits, c.labels, {}, at::Reduction::Sum, data::kIgnored);
  loss.backward();
  const LossSum ours = loss_sum(c.hidden, c.head, c.labels, true, false, bias);
  EXPECT_NEAR(ours.loss, loss.item<double>(), 2e-6 * loss.item<double>());
  const double error = (ours.gradient.to(at::kDouble) - hidden.grad()).abs().max().item<double>();
  EXPECT_LT(error, 5e-6 * hidden.grad().abs().max().item<double>());
  const double each = token_losses(c.hidden, c.head, c.labels, bias).sum().item<double>();
  EXPECT_NEAR(each, ours.loss, 1e-9 * ours.loss);
}

TEST(CrossEntropy, LossesByTokenAddUpAndIgnoredOnesAreZero) {
  const Case c = make_case(300, 16, 501, at::kFloat);
  const at::Tensor each = token_losses(c.hidden, c.head, c.labels);
  const LossSum sum = loss_sum(c.hidden, c.head, c.labels, false);
  EXPECT_NEAR(each.sum().item<double>(), sum.loss, 1e-9 * sum.loss);
  EXPECT_EQ(each.index_select(0, at::arange(0, 300, 5)).abs().max().item<double>(), 0.0);
}

TEST(CrossEntropy, EverythingIgnoredIsZeroLossAndZeroGradient) {
  Case c = make_case(9, 16, 50, at::kFloat);
  c.labels.fill_(data::kIgnored);
  const LossSum sum = loss_sum(c.hidden, c.head, c.labels, true);
  EXPECT_EQ(sum.loss, 0.0);
  EXPECT_EQ(sum.counted, 0);
  EXPECT_EQ(sum.gradient.abs().max().item<float>(), 0.0f);
}

TEST(CrossEntropy, HugeLogitsDoNotOverflowAndALabelOutsideIsRefused) {
  Case c = make_case(8, 16, 50, at::kFloat);
  c.hidden.mul_(1e4);
  EXPECT_TRUE(std::isfinite(loss_sum(c.hidden, c.head, c.labels, true).loss));
  c.labels.fill_(50);
  EXPECT_THROW(loss_sum(c.hidden, c.head, c.labels, false), DefectError);
}

}  // namespace
}  // namespace espalier::train
