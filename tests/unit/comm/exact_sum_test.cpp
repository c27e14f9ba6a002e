#include "pipeline/comm/exact_sum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

/// Units of values whose magnitudes spread over many powers of two.
std::vector<std::vector<float>> random_units(int units, int64_t size, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> power(-12, 3);
  std::vector<std::vector<float>> all(units, std::vector<float>(size));
  for (auto& unit : all)
    for (auto& value : unit) value = std::ldexp(normal(engine), power(engine));
  return all;
}

double largest_of(const std::vector<std::vector<float>>& units, int64_t begin, int64_t end) {
  double largest = 0;
  for (const auto& unit : units)
    for (int64_t i = begin; i < end; ++i) largest = std::max<double>(largest, std::fabs(unit[i]));
  return largest;
}

/// Round to nearest, ties to even, of value * 2^-exponent, in integer arithmetic of long double.
__int128 on_grid(float value, int exponent) {
  return static_cast<__int128>(
      std::nearbyintl(std::ldexp(static_cast<long double>(value), -exponent)));
}

TEST(ExactSum, EqualsTheIntegerSumOfTheRoundedAddends) {
  const std::vector<int64_t> sizes = {1, 7, 8, 33, 0, 1000};
  const int64_t size = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  auto units = random_units(37, size, 1);
  // As in an embedding's gradient: long runs of zeros of either sign, and a number among them.
  for (auto& unit : units) std::fill(unit.begin() + 150, unit.begin() + 500, -0.0f);
  units[3][401] = 0.5f;
  std::vector<double> largest(sizes.size(), 20.0);
  largest[2] = 3e-3;  // a finer grid, still without overflow
  ExactSum sum(sizes, 37);
  sum.set_grid(largest);
  for (const auto& unit : units) sum.add(unit);
  EXPECT_FALSE(sum.overflowed());

  std::vector<double> doubles(size);
  std::vector<float> floats(size);
  sum.result(doubles);
  sum.result(floats);
  int64_t offset = 0;
  for (size_t s = 0; s < sizes.size(); ++s) {
    const int exponent = sum.exponents()[s];
    for (int64_t i = offset; i < offset + sizes[s]; ++i) {
      __int128 expected = 0;
      for (const auto& unit : units) expected += on_grid(unit[i], exponent);
      const auto exact = std::ldexp(static_cast<long double>(expected), exponent);
      EXPECT_EQ(doubles[i], static_cast<double>(exact));
      EXPECT_EQ(floats[i], static_cast<float>(exact));
    }
    EXPECT_EQ(sum.unit_largest()[s], largest_of(units, offset, offset + sizes[s]));
    offset += sizes[s];
  }
}

TEST(ExactSum, AnyOrderAndGroupingGivesTheSameBits) {
  constexpr int count = 40;
  constexpr int64_t size = 517;
  const auto units = random_units(count, size, 2);
  const std::vector<double> largest = {8.0};
  ExactSum straight({size}, count);
  straight.set_grid(largest);
  for (const auto& unit : units) straight.add(unit);
  std::vector<double> expected(size), got(size);
  straight.result(expected);

  std::mt19937 engine(3);
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (const int groups : {1, 2, 3, 7}) {
    std::shuffle(order.begin(), order.end(), engine);
    std::vector<ExactSum> parts(groups, ExactSum({size}, count));
    for (auto& part : parts) part.set_exponents(straight.exponents());
    for (int i = 0; i < count; ++i) parts[i % groups].add(units[order[i]]);
    for (int g = 1; g < groups; ++g) parts[0].merge(parts[g]);
    parts[0].result(got);
    EXPECT_EQ(got, expected) << groups << " groups";
    EXPECT_EQ(parts[0].unit_largest()[0], straight.unit_largest()[0]);
  }
}

TEST(ExactSum, TiesRoundToEvenAndTheGridIsAskedForBits) {
  ExactSum sum({6}, 4);
  sum.set_grid(std::vector<double>{1.0}, 3);  // 1.0 is 2^2 steps: the step is 1/4
  ASSERT_EQ(sum.exponents()[0], -2);
  sum.add(std::vector<float>{0.125f, 0.375f, -0.125f, -0.375f, 0.126f, -1.0f});
  std::vector<double> out(6);
  sum.result(out);
  EXPECT_EQ(out, (std::vector<double>{0.0, 0.5, 0.0, -0.5, 0.25, -1.0}));
}

TEST(ExactSum, AFloatIsRoundedOnceFromTheInteger) {
  // 2^60 + 2^36 + 1 steps: rounding to double first would drop the 1 and then tie to even.
  ExactSum sum({1}, 4);
  const int zero = 0;
  sum.set_exponents({&zero, 1});
  for (const float addend : {0x1p60f, 0x1p36f, 1.0f}) sum.add(std::vector<float>{addend});
  std::vector<float> out(1);
  sum.result(out);
  EXPECT_EQ(out[0], std::nextafter(0x1p60f, 0x1p61f));
}

TEST(ExactSum, AnAllZeroSegmentHasAGrid) {
  ExactSum sum({3}, 2);
  sum.set_grid(std::vector<double>{0.0});
  sum.add(std::vector<float>{0.0f, -0.0f, 0x1p-110f});
  std::vector<double> out(3);
  sum.result(out);
  EXPECT_EQ(out, (std::vector<double>{0.0, 0.0, 0x1p-110}));
}

TEST(ExactSum, AUnitAboveTheGuardSetsTheFlagWhateverTheGrouping) {
  constexpr int units = 8;
  const auto overflows = [&](float value) {
    ExactSum sum({20}, units);
    sum.set_exponents(std::vector<int>{0});
    std::vector<float> unit(20, 1.0f);
    unit[19] = value;
    sum.add(unit);
    return sum.overflowed();
  };
  EXPECT_FALSE(overflows(0x1p59f));
  EXPECT_TRUE(overflows(std::nextafter(0x1p59f, 0x1p60f)));
  EXPECT_TRUE(overflows(-0x1p60f));
  EXPECT_TRUE(overflows(0x1p100f));

  ExactSum clean({20}, units), full({20}, units);
  for (auto* sum : {&clean, &full}) sum->set_exponents(std::vector<int>{0});
  full.add(std::vector<float>(20, 0x1p61f));
  clean.merge(full);
  EXPECT_TRUE(clean.overflowed());
  clean.set_exponents(std::vector<int>{4});
  EXPECT_FALSE(clean.overflowed());
}

TEST(ExactSum, NanAndInfinityAreNamedWithTheirSegment) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY})
    for (const int64_t position : {0, 3, 8, 16, 18}) {
      ExactSum sum({5, 19}, 2);
      sum.set_grid(std::vector<double>{1.0, 1.0});
      std::vector<float> unit(24, 0.5f);
      unit[5 + position] = bad;
      try {
        sum.add(unit);
        FAIL() << "no error for " << bad << " at " << position;
      } catch (const NumericalError& error) {
        EXPECT_NE(std::string(error.what()).find("segment 1"), std::string::npos) << error.what();
        EXPECT_NE(std::string(error.what()).find(std::to_string(position)), std::string::npos);
      }
    }
}

TEST(ExactSum, SumsOfDifferentGridsAreNotMerged) {
  ExactSum a({4}, 2), b({4}, 2);
  a.set_grid(std::vector<double>{1.0});
  b.set_grid(std::vector<double>{4.0});
  EXPECT_THROW(a.merge(b), DefectError);
}

}  // namespace
}  // namespace espalier::comm
