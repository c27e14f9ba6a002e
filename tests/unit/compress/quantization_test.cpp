#include "stages/compress/quantization.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::compress {
namespace {

at::Tensor unit_vectors(int64_t length, int64_t count, uint64_t seed) {
  at::Tensor x = at::empty({length, count}, at::kDouble);
  const CounterRandom random(seed, "vectors");
  for (int64_t i = 0; i < x.numel(); ++i) x.data_ptr<double>()[i] = random.normal(i);
  return x / x.norm(2, 0);
}

double relative_error(const at::Tensor& x, int64_t bits) {
  return ((dequantize(quantize(x, bits)) - x).norm() / x.norm()).item<double>();
}

TEST(Quantization, ReachesTheKnownErrorOfTheBestUniformQuantizerOfANormalVariable) {
  // J. Max, Quantizing for minimum distortion (1960), table II: mean squared error of the best
  // quantizer with equally spaced levels, 2 to 256 of them.
  const double squared[] = {0.3634, 0.1188, 0.03744, 0.01154, 0.003495};
  const at::Tensor x = unit_vectors(6000, 4, 1);
  for (int64_t bits = 1; bits <= 5; ++bits) {
    const double error = relative_error(x, bits);
    EXPECT_NEAR(error * error / squared[bits - 1], 1.0, 0.04) << bits;
  }
}

TEST(Quantization, ErrorFallsWithEveryBit) {
  const at::Tensor x = unit_vectors(577, 7, 2);
  double previous = 1;
  for (int64_t bits = 1; bits <= 8; ++bits) {
    const double error = relative_error(x, bits);
    EXPECT_LT(error, 0.65 * previous) << bits;
    previous = error;
  }
  EXPECT_LT(previous, 0.01);
}

TEST(Quantization, OneBitIsTheSignTimesTheMeanMagnitude) {
  const at::Tensor x = at::tensor({0.5, -0.25, 0.75, -0.1}, at::kDouble).reshape({4, 1});
  const at::Tensor y = dequantize(quantize(x, 1));
  for (int64_t i = 0; i < 4; ++i)
    EXPECT_NEAR(y[i][0].item<double>(), i % 2 ? -0.4 : 0.4, 0.4 * 0x1p-11);
}

TEST(Quantization, TakesExactlyTheBitsItPromisesAndNoScaleLeavesFloat16) {
  for (int64_t bits = 1; bits <= 8; ++bits) {
    const auto quantized = quantize(unit_vectors(13, 3, 5), bits);
    EXPECT_EQ(quantized.codes.numel(), (13 * 3 * bits + 7) / 8);
  }
  const auto longest = quantize(unit_vectors(300000, 1, 6), 8);
  EXPECT_GT(longest.scales[0].item<float>(), 0.01f);
}

TEST(Quantization, IsNoWorseThanTheStepOfTheLargestEntry) {
  const at::Tensor x = unit_vectors(900, 1, 7);
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const double middle = ((1 << bits) - 1) / 2.0;
    const double step = x.abs().max().item<double>() / middle;
    double error = 0;
    for (int64_t i = 0; i < 900; ++i) {
      const double value = x[i][0].item<double>();
      const double level = std::floor(value / step + middle + 0.5) - middle;
      error += std::pow(value - step * level, 2);
    }
    EXPECT_LE(relative_error(x, bits), std::sqrt(error) * 1.001) << bits;
  }
}

TEST(Quantization, AZeroVectorStaysZeroAndNanIsRefused) {
  EXPECT_EQ(dequantize(quantize(at::zeros({9, 2}), 3)).abs().max().item<double>(), 0.0);
  EXPECT_THROW(quantize(at::full({4, 1}, std::numeric_limits<double>::quiet_NaN()), 4),
               NumericalError);
}

}  // namespace
}  // namespace espalier::compress
