#include "pipeline/model/sequence_head.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>
#include <limits>

#include "pipeline/linalg/product.h"

namespace espalier::model {
namespace {

using Pooling = SequenceHead::Pooling;

at::Tensor numbers(at::IntArrayRef shape, double step) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return (at::arange(count, at::kDouble) * step).sin().to(at::kFloat).view(shape);
}

SequenceHead encoder_head(Pooling pooling) {
  return {pooling,
          2,
          {{"dense.weight", numbers({4, 4}, 0.7), false},
           {"dense.bias", numbers({4}, 1.3), false},
           {"classifier.weight", numbers({2, 4}, 0.9), false},
           {"classifier.bias", numbers({2}, 2.1), false}}};
}

/// The head by loops in float64.
std::vector<double> by_hand(const SequenceHead& head, const at::Tensor& x, const UnitShape& unit) {
  std::vector<std::vector<double>> tensors;
  for (const auto& t : head.tensors) {
    const at::Tensor wide = t.value.to(at::kDouble).contiguous();
    tensors.emplace_back(wide.const_data_ptr<double>(),
                         wide.const_data_ptr<double>() + wide.numel());
  }
  const auto row = [&](const std::vector<double>& in, const std::vector<double>& w, size_t i) {
    double sum = 0;
    for (size_t j = 0; j < in.size(); ++j) sum += in[j] * w[i * in.size() + j];
    return sum;
  };
  std::vector<double> logits;
  for (int64_t s = 0; s < unit.sequences; ++s) {
    const bool last = head.pooling == Pooling::last_token;
    const int64_t token =
        s * unit.length +
        (last ? (unit.visible.defined() ? unit.visible[s].item<int64_t>() : unit.length) - 1 : 0);
    std::vector<double> pooled;
    for (int64_t j = 0; j < x.size(1); ++j) pooled.push_back(x[token][j].item<double>());
    if (!last) {
      std::vector<double> dense;
      for (size_t i = 0; i < pooled.size(); ++i) {
        const double sum = row(pooled, tensors[0], i) + tensors[1][i];
        dense.push_back(head.pooling == Pooling::first_token_tanh
                            ? std::tanh(sum)
                            : 0.5 * sum * (1 + std::erf(sum / std::sqrt(2.0))));
      }
      pooled = dense;
    }
    for (int64_t label = 0; label < head.labels; ++label)
      logits.push_back(row(pooled, tensors[last ? 0 : 2], label) + (last ? 0 : tensors[3][label]));
  }
  return logits;
}

TEST(SequenceHead, LogitsAreThoseOfALoopForEveryPooling) {
  const at::Tensor x = numbers({6, 4}, 0.37);
  UnitShape unit{2, 3, {}};
  const SequenceHead score{Pooling::last_token, 2, {{"score.weight", numbers({2, 4}, 0.9), false}}};
  for (const SequenceHead& head :
       {encoder_head(Pooling::first_token_tanh), encoder_head(Pooling::first_token_gelu), score}) {
    for (const bool padded : {false, true}) {
      unit.visible = padded ? at::tensor({1, 2}, at::kLong) : at::Tensor();
      const at::Tensor logits = sequence_logits(head, head.values(), x, unit);
      const std::vector<double> expected = by_hand(head, x, unit);
      ASSERT_EQ(logits.numel(), 4);
      for (int64_t i = 0; i < 4; ++i)
        EXPECT_NEAR(logits.flatten()[i].item<double>(), expected[i], 1e-6);
    }
  }
}

/// Central differences of f at every element of x, which f reads.
at::Tensor differences(at::Tensor& x, const std::function<double()>& f) {
  at::Tensor gradient = at::zeros(x.sizes(), at::kDouble);
  float* value = x.data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    const float kept = value[i];
    value[i] = kept + 1e-2f;
    const double above = f(), up = value[i];
    value[i] = kept - 1e-2f;
    const double below = f(), down = value[i];
    value[i] = kept;
    gradient.flatten()[i] = (above - below) / (up - down);
  }
  return gradient;
}

TEST(SequenceHead, GradientsOfTheLossAreThoseOfDifferences) {
  linalg::one_library_thread();  // thousands of tiny products
  const UnitShape unit{3, 2, at::tensor({2, 1, 2}, at::kLong)};
  for (const Pooling pooling : {Pooling::first_token_tanh, Pooling::first_token_gelu}) {
    for (const Problem problem : {Problem::classification, Problem::regression}) {
      SequenceHead head = encoder_head(pooling);
      if (problem == Problem::regression) {
        head.labels = 1;
        head.tensors[2].value = numbers({1, 4}, 0.9);
        head.tensors[3].value = numbers({1}, 2.1);
      }
      const at::Tensor labels = problem == Problem::classification
                                    ? at::tensor({1, 0, 1}, at::kLong)
                                    : at::tensor({0.5, -1.0, 2.0}, at::kDouble);
      std::vector<at::Tensor> inputs = head.values();
      inputs.push_back(numbers({6, 4}, 0.37));
      const auto loss = [&] {
        return sequence_loss(
            sequence_logits(head, {inputs.begin(), inputs.end() - 1}, inputs.back(), unit), labels,
            problem);
      };
      std::vector<at::Tensor> expected;
      for (at::Tensor& input : inputs)
        expected.push_back(differences(input, [&] { return loss().item<double>(); }));
      for (at::Tensor& input : inputs) input.set_requires_grad(true);
      const auto gradients = torch::autograd::grad({loss()}, inputs);
      for (size_t i = 0; i < inputs.size(); ++i)
        EXPECT_LT((gradients[i].to(at::kDouble) - expected[i]).abs().max().item<double>(), 2e-3);
    }
  }
}

TEST(SequenceHead, TheLossIsASumOverSequencesThatHaveALabel) {
  const at::Tensor logits = at::tensor({1.0, 2.0, 0.5, -1.0}, at::kFloat).view({2, 2});
  const double first = std::log(std::exp(1.0) + std::exp(2.0)) - 2.0;
  EXPECT_NEAR(sequence_loss(logits, at::tensor({1, -100}, at::kLong), Problem::classification)
                  .item<double>(),
              first, 1e-12);
  const at::Tensor numbers = at::tensor({1.5, 2.5}, at::kFloat).view({2, 1});
  const at::Tensor labels =
      at::tensor({std::numeric_limits<double>::quiet_NaN(), 1.0}, at::kDouble);
  EXPECT_NEAR(sequence_loss(numbers, labels, Problem::regression).item<double>(), 2.25, 1e-12);
}

}  // namespace
}  // namespace espalier::model
