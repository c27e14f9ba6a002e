#include "pipeline/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace espalier {
namespace {

TEST(CounterRandom, ADrawDependsOnlyOnSeedPurposeStreamAndIndex) {
  const CounterRandom a(1, "spp.alpha", stream_of("model.layers.0.self_attn.q_proj.weight"));
  const CounterRandom b(1, "spp.alpha", stream_of("model.layers.0.self_attn.q_proj.weight"));
  for (uint64_t i : {9u, 0u, 4u}) EXPECT_EQ(a.bits(i), b.bits(i));
  EXPECT_NE(a.bits(0), CounterRandom(2, "spp.alpha", stream_of("x")).bits(0));
  EXPECT_NE(
      a.bits(0),
      CounterRandom(1, "dropout", stream_of("model.layers.0.self_attn.q_proj.weight")).bits(0));
}

TEST(CounterRandom, UniformAndNormalHaveTheMomentsOfTheirDistributions) {
  const CounterRandom random(7, "moments");
  double sum = 0, square = 0, uniform = 0;
  constexpr int n = 200000;
  for (int i = 0; i < n; ++i) {
    const double z = random.normal(i);
    sum += z;
    square += z * z;
    uniform += random.uniform(i);
  }
  EXPECT_NEAR(sum / n, 0.0, 4 / std::sqrt(n));
  EXPECT_NEAR(square / n, 1.0, 4 * std::sqrt(2.0 / n));
  EXPECT_NEAR(uniform / n, 0.5, 4 / std::sqrt(12.0 * n));
}

TEST(CounterRandom, BelowStaysBelowAndReachesEveryValue) {
  const CounterRandom random(3, "starts");
  std::set<uint64_t> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(random.below(i, 17));
  EXPECT_EQ(seen.size(), 17u);
  EXPECT_EQ(*seen.rbegin(), 16u);
}

}  // namespace
}  // namespace espalier
