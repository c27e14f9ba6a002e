#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/random.h"
#include "stages/discover/largest.h"
#include "stages/discover/method.h"
#include "tests/unit/io/temporary_directory.h"

namespace espalier::discover {
namespace {

using io::expect_contains;
using io::message_of;

/// A method made from a configuration file of one node, as the driver makes it.
std::unique_ptr<Method> make(const std::string& keys) {
  const io::TemporaryDirectory directory;
  io::write_file(directory / "default.yaml", "discover:\n" + keys);
  const auto composition = config::compose({directory.path(), "default", {}});
  const auto section = composition.root().child("discover");
  auto method = make_method(section);
  section.finish();
  return method;
}

/// Few different values: full of ties.
std::vector<float> tied_values(size_t count, uint64_t seed) {
  std::vector<float> values;
  const CounterRandom random(seed, "test");
  for (size_t i = 0; i < count; ++i) values.push_back(float(random.below(i, 9)) - 4);
  return values;
}

TEST(LargestPositions, AreThoseOfAStableSort) {
  for (const size_t count : {1u, 63u, 64u, 65u, 1000u, 4097u}) {
    const auto values = tied_values(count, count);
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::abs(values[a]) > std::abs(values[b]);
    });
    for (const float floor : {0.0f, 2.0f})
      for (const size_t wanted : {size_t{1}, size_t{16}, count}) {
        std::vector<int64_t> expected;
        for (const int64_t i : order)
          if (expected.size() < wanted && std::abs(values[i]) > floor) expected.push_back(i);
        std::sort(expected.begin(), expected.end());
        EXPECT_EQ(largest_positions(values, int64_t(wanted), floor), expected);
      }
  }
}

TEST(Magnitude, TakesExactlyTheLargestAndStatesTheObjective) {
  const auto method = make("  method: magnitude\n");
  const at::Tensor w = at::tensor({1.0f, -5.0f, 0.5f, 5.0f, 5.0f, -2.0f}).reshape({2, 3});
  const IndexSet set = method->discover({"w", w, 0}, 2);
  EXPECT_EQ(set.positions, (std::vector<int64_t>{1, 3}));  // the tie falls to the lower position
  EXPECT_DOUBLE_EQ(set.objective, (1 + 0.25 + 25 + 4) / 2.0);
  expect_contains(message_of<NumericalError>([&] {
                    method->discover({"zero.weight", at::zeros({4, 4}, at::kFloat), 0}, 1);
                  }),
                  {"zero.weight", "discover.cardinality"});
}

TEST(RandomPositions, AreDistinctReproducibleAndEverywhere) {
  const auto method = make("  method: random\n");
  const at::Tensor w = at::ones({30, 20}, at::kFloat);
  const IndexSet set = method->discover({"a", w, 1}, 300);
  EXPECT_EQ(std::set<int64_t>(set.positions.begin(), set.positions.end()).size(), 300u);
  EXPECT_TRUE(std::is_sorted(set.positions.begin(), set.positions.end()));
  EXPECT_GE(set.positions.front(), 0);
  EXPECT_LT(set.positions.back(), 600);
  EXPECT_DOUBLE_EQ(set.objective, 150);
  EXPECT_EQ(set.positions, method->discover({"a", w, 1}, 300).positions);
  EXPECT_NE(set.positions, method->discover({"b", w, 1}, 300).positions);
  EXPECT_NE(set.positions, method->discover({"a", w, 2}, 300).positions);
  // Each position is drawn about equally often: 16 of 600, 3000 times, is 80 +- 9 each.
  std::vector<int> drawn(600, 0);
  for (uint64_t seed = 0; seed < 3000; ++seed)
    for (const int64_t p : method->discover({"a", w, seed}, 16).positions) ++drawn[p];
  EXPECT_GT(*std::min_element(drawn.begin(), drawn.end()), 80 - 45);
  EXPECT_LT(*std::max_element(drawn.begin(), drawn.end()), 80 + 45);
}

TEST(DiscoverKeys, BadValuesAreRefusedAtTheKey) {
  const auto error = [](const std::string& keys) {
    return message_of<UserError>([&] { make(keys); });
  };
  expect_contains(error("  method: grebsno\n"), {"discover.method", "grebsmo", "magnitude"});
  expect_contains(error("  method: grebsmo\n  form: quick\n"), {"discover.form", "published"});
  expect_contains(error("  method: grebsmo\n  form: fast\n  rank: 0\n"), {"discover.rank"});
  expect_contains(error("  method: grebsmo\n  form: fast\n  improvement: 0\n"),
                  {"discover.improvement"});
  expect_contains(error("  method: magnitude\n  threshold: 2\n"), {"discover.threshold"});
}

}  // namespace
}  // namespace espalier::discover
