#include "pipeline/longest_first.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "pipeline/random.h"

namespace espalier {
namespace {

using Units = std::vector<std::vector<int64_t>>;

TEST(LongestFirst, BalancesKnownCosts) {
  EXPECT_EQ(longest_first({1, 7, 3, 3, 2}, 2), (Units{{1, 0}, {2, 3, 4}}));
  EXPECT_EQ(longest_first({50, 25, 15, 10}, 2), (Units{{0}, {1, 2, 3}}));
}

TEST(LongestFirst, EqualCostsAreDealtInTurn) {
  EXPECT_EQ(longest_first({3, 3, 3, 3, 3}, 2), (Units{{0, 2, 4}, {1, 3}}));
}

TEST(LongestFirst, MoreRanksThanUnitsLeaveSomeWithout) {
  EXPECT_EQ(longest_first({2}, 3), (Units{{0}, {}, {}}));
  EXPECT_EQ(longest_first({}, 2), (Units{{}, {}}));
}

TEST(LongestFirst, EveryUnitIsDealtOnceWithinGrahamsBound) {
  const CounterRandom random(1, "costs", 0);
  for (int ranks = 1; ranks <= 5; ++ranks) {
    std::vector<double> costs(23);
    for (size_t i = 0; i < costs.size(); ++i)
      costs[i] = random.uniform(i + 100 * static_cast<size_t>(ranks), 1, 100);
    std::vector<int64_t> dealt;
    double heaviest = 0;
    for (const auto& units : longest_first(costs, ranks)) {
      double load = 0;
      for (const int64_t unit : units) load += costs[unit];
      heaviest = std::max(heaviest, load);
      dealt.insert(dealt.end(), units.begin(), units.end());
    }
    std::sort(dealt.begin(), dealt.end());
    std::vector<int64_t> all(costs.size());
    std::iota(all.begin(), all.end(), 0);
    EXPECT_EQ(dealt, all);
    const double best = std::max(std::accumulate(costs.begin(), costs.end(), 0.0) / ranks,
                                 *std::max_element(costs.begin(), costs.end()));
    EXPECT_LE(heaviest, best * 4 / 3);
  }
}

}  // namespace
}  // namespace espalier
