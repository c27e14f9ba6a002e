#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "pipeline/comm/exact_sum.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

constexpr int kTokens = 24;

/// Grams X^T X of `units` random inputs; `scale(feature)` is each feature's magnitude.
template <class Scale>
std::vector<std::vector<float>> random_grams(int units, int64_t n, unsigned seed, Scale scale) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> grams;
  for (int u = 0; u < units; ++u) {
    std::vector<float> x(kTokens * n);
    for (int t = 0; t < kTokens; ++t)
      for (int64_t i = 0; i < n; ++i) x[t * n + i] = normal(engine) * scale(u, i);
    auto& gram = grams.emplace_back(n * n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        for (int t = 0; t < kTokens; ++t) gram[i * n + j] += x[t * n + i] * x[t * n + j];
  }
  return grams;
}

std::vector<float> diagonal(const std::vector<float>& gram, int64_t n) {
  std::vector<float> entries(n);
  for (int64_t i = 0; i < n; ++i) entries[i] = gram[i * n + i];
  return entries;
}

std::vector<double> result_of(const ExactGram& gram) {
  std::vector<double> out(gram.n() * gram.n());
  gram.result(out.data());
  return out;
}

TEST(ExactGram, EqualsTheIntegerSumOfTheRoundedEntries) {
  constexpr int units = 11;
  constexpr int64_t n = 71;
  const auto grams = random_grams(
      units, n, 1, [](int, int64_t i) { return std::ldexp(1.0f, static_cast<int>(i % 21) - 10); });
  ExactGram sum(n, units);
  sum.set_grid(diagonal(grams[0], n));
  for (const auto& gram : grams) sum.add(gram.data(), n);
  ASSERT_FALSE(sum.overflowed());
  const auto out = result_of(sum);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) {
      const int exponent = sum.exponents()[i] + sum.exponents()[j];
      __int128 expected = 0;
      for (const auto& gram : grams)
        expected += static_cast<__int128>(
            std::nearbyintl(std::ldexp(static_cast<long double>(gram[i * n + j]), -exponent)));
      const auto exact =
          static_cast<double>(std::ldexp(static_cast<long double>(expected), exponent));
      EXPECT_EQ(out[i * n + j], exact) << i << ", " << j;
      EXPECT_EQ(out[j * n + i], exact);
    }
}

TEST(ExactGram, KeepsTheDigitsOfFeaturesAMillionTimesSmaller) {
  constexpr int units = 16;
  constexpr int64_t n = 24;
  const auto scale = [](int, int64_t i) { return i % 2 ? 1e3f : 1.0f; };
  const auto grams = random_grams(units, n, 2, scale);
  ExactGram sum(n, units);
  sum.set_grid(diagonal(grams[0], n));
  for (const auto& gram : grams) sum.add(gram.data(), n);
  const auto out = result_of(sum);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double expected = 0;
      for (const auto& gram : grams) expected += gram[std::min(i, j) * n + std::max(i, j)];
      EXPECT_NEAR(out[i * n + j], expected, 1e-12 * std::sqrt(out[i * n + i] * out[j * n + j]));
    }
}

TEST(ExactGram, AnyOrderGroupingAndStrideGivesTheSameBits) {
  constexpr int units = 13;
  constexpr int64_t n = 45, stride = 53;
  const auto grams = random_grams(units, n, 3, [](int, int64_t) { return 1.0f; });
  ExactGram straight(n, units);
  straight.set_grid(diagonal(grams[0], n));
  for (const auto& gram : grams) straight.add(gram.data(), n);
  const auto expected = result_of(straight);

  std::mt19937 engine(4);
  std::vector<int> order(units);
  std::iota(order.begin(), order.end(), 0);
  for (const int groups : {1, 2, 3, 8}) {
    std::shuffle(order.begin(), order.end(), engine);
    std::vector<ExactGram> parts(groups, ExactGram(n, units));
    for (auto& part : parts) part.set_exponents(straight.exponents());
    for (int u = 0; u < units; ++u) {
      // Strided, and with the lower triangle poisoned: only j >= i is read.
      std::vector<float> wide(n * stride, NAN);
      for (int64_t i = 0; i < n; ++i)
        std::copy_n(&grams[order[u]][i * n + i], n - i, &wide[i * stride + i]);
      parts[u % groups].add(wide.data(), stride);
    }
    for (int g = 1; g < groups; ++g) parts[0].merge(parts[g]);
    EXPECT_EQ(result_of(parts[0]), expected) << groups << " groups";
  }
}

TEST(ExactGram, AFeatureSilentInUnit0StillCounts) {
  constexpr int units = 4;
  constexpr int64_t n = 9;
  const auto grams = random_grams(
      units, n, 5, [](int unit, int64_t i) { return i == 4 ? (unit == 0 ? 0.0f : 1e-3f) : 1.0f; });
  ExactGram sum(n, units);
  sum.set_grid(diagonal(grams[0], n));
  const auto exponents = sum.exponents();
  const int largest = *std::max_element(exponents.begin(), exponents.end());
  EXPECT_EQ(exponents[4], largest - 12);
  for (const auto& gram : grams) sum.add(gram.data(), n);
  EXPECT_FALSE(sum.overflowed());
  double expected = 0;
  for (const auto& gram : grams) expected += gram[4 * n + 4];
  EXPECT_NEAR(result_of(sum)[4 * n + 4], expected, 1e-10 * expected);
}

TEST(ExactGram, TheScaledDiagonalOfUnit0LeavesTheHeadroom) {
  for (const int64_t units : {int64_t{1}, int64_t{100}, int64_t{1000000}})
    for (const float entry : {1e-6f, 1.0f, 3.0f, 65504.0f}) {
      ExactGram sum(1, units);
      sum.set_grid(std::vector<float>{entry}, 8);
      const double scaled = std::ldexp(static_cast<double>(entry), -2 * sum.exponents()[0]);
      const double aim = 0x1p54 / static_cast<double>(units);
      EXPECT_LE(scaled, aim);
      EXPECT_GE(scaled, aim / 16);
      sum.add(&entry, 1);
      EXPECT_FALSE(sum.overflowed());
      const float larger = entry * 255;
      sum.add(&larger, 1);
      EXPECT_FALSE(sum.overflowed()) << units << " units of " << entry;
      const float too_large = entry * 0x1p13f;
      sum.add(&too_large, 1);
      EXPECT_TRUE(sum.overflowed());
    }
}

TEST(ExactGram, AllSilentUnit0IsAccepted) {
  ExactGram sum(3, 2);
  sum.set_grid(std::vector<float>(3, 0.0f));
  const std::vector<float> zeros(9, 0.0f);
  sum.add(zeros.data(), 3);
  EXPECT_EQ(result_of(sum), std::vector<double>(9, 0.0));
}

TEST(ExactGram, NanAndInfinityAreNamedWithTheirFeatures) {
  std::vector<float> gram(20 * 20, 1.0f);
  gram[3 * 20 + 17] = INFINITY;
  ExactGram sum(20, 2);
  sum.set_grid(std::vector<float>(20, 1.0f));
  try {
    sum.add(gram.data(), 20);
    FAIL();
  } catch (const NumericalError& error) {
    EXPECT_NE(std::string(error.what()).find("features 3 and 17"), std::string::npos)
        << error.what();
  }
  EXPECT_THROW(sum.set_grid(std::vector<float>(20, NAN)), NumericalError);
}

}  // namespace
}  // namespace espalier::comm
