#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/random.h"
#include "pipeline/train/adamw.h"
#include "pipeline/train/schedule.h"

namespace espalier::train {
namespace {

constexpr int64_t kSize = 1003;
constexpr int kSteps = 25;

float start_value(int64_t i) { return static_cast<float>(CounterRandom(1, "w").normal(i)); }
float gradient_value(int step, int64_t i) {
  return static_cast<float>(CounterRandom(1, "g", step).normal(i) * std::pow(10.0, i % 7 - 5));
}

std::vector<float> trained(const AdamwOptions& options, double rate) {
  Adamw adamw(kSize, options);
  std::vector<float> w(kSize), g(kSize);
  for (int64_t i = 0; i < kSize; ++i) w[i] = start_value(i);
  for (int step = 1; step <= kSteps; ++step) {
    for (int64_t i = 0; i < kSize; ++i) g[i] = gradient_value(step, i);
    adamw.update(w, g, 0, rate, step);
  }
  return w;
}

TEST(Adamw, AgreesWithTheFormulaInDouble) {
  const AdamwOptions options{0.9, 0.999, 1e-8, 0.05};
  const std::vector<float> ours = trained(options, 4e-3);
  for (int64_t i = 0; i < kSize; ++i) {
    double w = start_value(i), m = 0, v = 0;
    for (int t = 1; t <= kSteps; ++t) {
      const double g = gradient_value(t, i);
      m = options.beta1 * m + (1 - options.beta1) * g;
      v = options.beta2 * v + (1 - options.beta2) * g * g;
      w -= 4e-3 * options.weight_decay * w;
      w -= 4e-3 * (m / (1 - std::pow(options.beta1, t))) /
           (std::sqrt(v / (1 - std::pow(options.beta2, t))) + options.eps);
    }
    // Two roundings of w a step (decay, update), each half a unit in the last place at most.
    EXPECT_NEAR(ours[i], w, kSteps * 2 * 0x1p-24 * std::max(1.0, std::fabs(w))) << i;
  }
}

TEST(Adamw, GivesTheBitsOfAPlainLoopInFloat32AtAnyLength) {
  const AdamwOptions options{0.9, 0.999, 1e-8, 0.05};
  for (const int64_t size : {1, 3, 7, 8, 9, 31, 64, 77}) {
    Adamw adamw(size, options);
    std::vector<float> ours(size), w(size), m(size), v(size), g(size);
    for (int64_t i = 0; i < size; ++i) ours[i] = w[i] = start_value(i);
    for (int step = 1; step <= 3; ++step) {
      for (int64_t i = 0; i < size; ++i) g[i] = gradient_value(step, i);
      adamw.update(ours, g, 0, 1e-3, step);
      for (int64_t i = 0; i < size; ++i) {
        m[i] += 0.1f * (g[i] - m[i]);
        v[i] = v[i] * 0.999f + static_cast<float>(1 - 0.999) * g[i] * g[i];
        const float root = std::sqrt(static_cast<float>(1 - std::pow(0.999, step)));
        const float denominator = std::sqrt(v[i]) / root + 1e-8f;
        w[i] = w[i] * static_cast<float>(1 - 1e-3 * 0.05) +
               static_cast<float>(-1e-3 / (1 - std::pow(0.9, step))) * m[i] / denominator;
      }
      EXPECT_EQ(ours, w) << size << " numbers, step " << step;
    }
  }
}

TEST(Adamw, AgreesWithTorchsOptimizer) {
  const AdamwOptions options{0.8, 0.95, 1e-6, 0.01};
  const std::vector<float> ours = trained(options, 1e-2);
  at::Tensor w = at::empty({kSize});
  for (int64_t i = 0; i < kSize; ++i) w[i] = start_value(i);
  w.set_requires_grad(true);
  torch::optim::AdamW torchs({w}, torch::optim::AdamWOptions(1e-2)
                                      .betas({options.beta1, options.beta2})
                                      .eps(options.eps)
                                      .weight_decay(options.weight_decay));
  for (int step = 1; step <= kSteps; ++step) {
    at::Tensor g = at::empty({kSize});
    for (int64_t i = 0; i < kSize; ++i) g[i] = gradient_value(step, i);
    w.mutable_grad() = g;
    torchs.step();
  }
  const float* theirs = w.const_data_ptr<float>();
  for (int64_t i = 0; i < kSize; ++i)
    EXPECT_NEAR(ours[i], theirs[i], 1e-6 * std::max(1.0f, std::fabs(theirs[i]))) << i;
}

TEST(Adamw, RangesUpdatedApartGiveTheBitsOfOneCall) {
  const AdamwOptions options{0.9, 0.999, 1e-8, 0.05};
  Adamw whole(kSize, options), parts(kSize, options);
  std::vector<float> a(kSize, 1.0f), b(kSize, 1.0f), g(kSize);
  for (int64_t i = 0; i < kSize; ++i) g[i] = gradient_value(1, i);
  whole.update(a, g, 0, 1e-3, 1);
  const std::span<float> values(b);
  const std::span<const float> gradient(g);
  for (int64_t begin : {0, 101, 517}) {
    const int64_t end = begin == 0 ? 101 : begin == 101 ? 517 : kSize;
    parts.update(values.subspan(begin, end - begin), gradient.subspan(begin, end - begin), begin,
                 1e-3, 1);
  }
  EXPECT_EQ(a, b);
}

TEST(ClipGradient, ScalesToTheNormAsTorchDoes) {
  std::vector<float> g = {3, 4, 0};
  EXPECT_DOUBLE_EQ(clip_gradient(g, 1.0), 5.0);
  EXPECT_FLOAT_EQ(g[0], 3.0f * static_cast<float>(1.0 / (5.0 + 1e-6)));
  std::vector<float> small = {0.3f, 0.4f};
  clip_gradient(small, 1.0);
  EXPECT_EQ(small, (std::vector<float>{0.3f, 0.4f}));
}

// The factors that transformers 5.23's get_{linear,cosine,constant}_schedule_with_warmup give for 3
// warm-up steps of 10, printed by that program with a rate of 4e-3.
TEST(Schedule, GivesTransformersNumbers) {
  const std::vector<double> linear = {0.0,
                                      0.0013333333333333333,
                                      0.0026666666666666666,
                                      0.004,
                                      0.0034285714285714284,
                                      0.002857142857142857,
                                      0.0022857142857142855,
                                      0.0017142857142857142,
                                      0.0011428571428571427,
                                      0.0005714285714285714,
                                      0.0};
  const std::vector<double> cosine = {0.0,
                                      0.0013333333333333333,
                                      0.0026666666666666666,
                                      0.004,
                                      0.003801937735804838,
                                      0.003246979603717467,
                                      0.0024450418679126287,
                                      0.0015549581320873714,
                                      0.000753020396282533,
                                      0.00019806226419516194,
                                      0.0};
  for (int step = 0; step <= 10; ++step) {
    EXPECT_NEAR(4e-3 * make_schedule("linear", 10, 3, 0).factor(step), linear[step], 1e-17);
    EXPECT_NEAR(4e-3 * make_schedule("cosine", 10, 3, 0).factor(step), cosine[step], 1e-17);
    EXPECT_NEAR(4e-3 * make_schedule("constant", 10, 3, 0).factor(step),
                step < 3 ? linear[step] : 4e-3, 1e-17);
  }
}

TEST(Schedule, RoundsTheWarmUpRatioUpAndRefusesAWarmUpThatIsTooLong) {
  EXPECT_EQ(make_schedule("linear", 120, std::nullopt, 0.03).warmup_steps, 4);
  EXPECT_EQ(make_schedule("linear", 120, 7, 0.03).warmup_steps, 7);
  EXPECT_THROW(make_schedule("linear", 10, 11, 0), UserError);
  EXPECT_THROW(make_schedule("exponential", 10, 1, 0), UserError);
}

}  // namespace
}  // namespace espalier::train
