#include "stages/compress/allocation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "pipeline/random.h"

namespace espalier::compress {
namespace {

/// A spectrum with the given sigma^2, of which `computed` are known.
Spectrum spectrum(std::vector<double> squares, int64_t cost, int64_t computed = 1 << 30) {
  Spectrum s;
  s.energy = std::accumulate(squares.begin(), squares.end(), 0.0);
  s.largest_rank = static_cast<int64_t>(squares.size());
  s.cost = cost;
  squares.resize(std::min<int64_t>(computed, s.largest_rank));
  s.squares = std::move(squares);
  return s;
}

std::vector<Spectrum> random_case(uint64_t seed) {
  const CounterRandom random(seed, "allocation");
  std::vector<Spectrum> matrices;
  for (uint64_t i = 0; i < 3; ++i) {
    std::vector<double> squares;
    double value = random.uniform(100 * i, 0.5, 20);
    for (uint64_t r = 0; r < 4; ++r, value *= random.uniform(100 * i + r + 1))
      squares.push_back(value);
    matrices.push_back(spectrum(squares, 2 + int64_t(random.below(100 * i + 50, 7))));
  }
  return matrices;
}

double lost(const std::vector<Spectrum>& matrices, const std::vector<int64_t>& ranks) {
  double sum = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    sum += matrices[i].energy;
    for (int64_t r = 0; r < ranks[i]; ++r) sum -= matrices[i].squares[r];
  }
  return sum;
}

int64_t cost(const std::vector<Spectrum>& matrices, const std::vector<int64_t>& ranks) {
  int64_t sum = 0;
  for (size_t i = 0; i < matrices.size(); ++i) sum += ranks[i] * matrices[i].cost;
  return sum;
}

double best_by_trying_all(const std::vector<Spectrum>& matrices, int64_t capacity) {
  double best = std::numeric_limits<double>::infinity();
  std::vector<int64_t> ranks(matrices.size(), 0);
  const std::function<void(size_t)> visit = [&](size_t i) {
    if (i == matrices.size()) {
      if (cost(matrices, ranks) <= capacity) best = std::min(best, lost(matrices, ranks));
      return;
    }
    for (ranks[i] = 0; ranks[i] <= matrices[i].largest_rank; ++ranks[i]) visit(i + 1);
    ranks[i] = 0;
  };
  visit(0);
  return best;
}

TEST(Allocation, GreedyIsWithinItsCertificateOfTheBestOfAllAllocations) {
  int exact = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const auto matrices = random_case(seed);
    const int64_t capacity = 3 + int64_t(seed % 41);
    const auto greedy = allocate_greedy(matrices, capacity);
    const double best = best_by_trying_all(matrices, capacity);
    const double reached = lost(matrices, greedy.truncation_ranks);
    EXPECT_LE(cost(matrices, greedy.truncation_ranks), capacity);
    EXPECT_EQ(cost(matrices, greedy.truncation_ranks), greedy.used);
    EXPECT_LE(reached - best, greedy.gap + 1e-9) << "seed " << seed;
    exact += reached - best < 1e-9;
  }
  EXPECT_GT(exact, 100);  // the certificate is not met by being wide
}

TEST(Allocation, GreedyIsOptimalWhenAllCostsAreEqual) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    auto matrices = random_case(seed);
    for (auto& matrix : matrices) matrix.cost = 3;
    const auto greedy = allocate_greedy(matrices, 3 * 5);
    EXPECT_NEAR(lost(matrices, greedy.truncation_ranks), best_by_trying_all(matrices, 15), 1e-9);
    EXPECT_NEAR(greedy.gap, 0, 1e-12);
  }
}

TEST(Allocation, GreedyAsksForMoreValuesUntilItsAnswerIsTheOneOfTheWholeSpectrum) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const auto whole = random_case(seed);
    auto known = whole;
    for (auto& matrix : known) matrix.squares.resize(1);
    Allocation allocation = allocate_greedy(known, 20);
    for (int round = 0; !allocation.wants_more.empty(); ++round) {
      ASSERT_LT(round, 12);
      for (int64_t i : allocation.wants_more)
        known[i].squares.push_back(whole[i].squares[known[i].squares.size()]);
      allocation = allocate_greedy(known, 20);
    }
    const auto expected = allocate_greedy(whole, 20);
    EXPECT_EQ(allocation.truncation_ranks, expected.truncation_ranks);
    EXPECT_GE(allocation.gap, expected.gap);  // the bound of an unknown value is wider, never false
  }
}

TEST(Allocation, UniformIsTheLargestCommonRankThatFits) {
  const std::vector<Spectrum> matrices = {spectrum({9, 4, 1}, 10), spectrum({5}, 4),
                                          spectrum({7, 6, 5, 4, 3}, 20)};
  EXPECT_EQ(allocate_uniform(matrices, 33).truncation_ranks, (std::vector<int64_t>{0, 0, 0}));
  EXPECT_EQ(allocate_uniform(matrices, 34).truncation_ranks, (std::vector<int64_t>{1, 1, 1}));
  EXPECT_EQ(allocate_uniform(matrices, 64).truncation_ranks, (std::vector<int64_t>{2, 1, 2}));
  EXPECT_EQ(allocate_uniform(matrices, 1000).truncation_ranks, (std::vector<int64_t>{3, 1, 5}));
  EXPECT_EQ(allocate_uniform(matrices, 1000, 2).truncation_ranks, (std::vector<int64_t>{2, 1, 2}));
}

/// f(r) = e^(-b r) exactly, for which the relaxed problem has a closed solution.
Spectrum exponential(double scale, double rate, int64_t cost) {
  Spectrum s;
  s.energy = scale;
  s.cost = cost;
  s.largest_rank = 400;
  for (int64_t r = 0; r < s.largest_rank; ++r)
    s.squares.push_back(scale * (std::exp(-rate * double(r)) - std::exp(-rate * double(r + 1))));
  return s;
}

TEST(Allocation, ThePapersRanksSolveTheRelaxedProblemForExponentialDecay) {
  const std::vector<Spectrum> matrices = {exponential(1, 0.02, 100), exponential(5, 0.05, 300)};
  const int64_t capacity = 40000;
  const auto allocation = allocate_paper(matrices, capacity, 0.0);
  // Stationarity by hand: r_i = (ln(a_i b_i / c_i) - ln lambda) / b_i with the constraint tight.
  const double q0 = std::log(1 * 0.02 / 100), q1 = std::log(5 * 0.05 / 300);
  const double log_lambda =
      (100 * q0 / 0.02 + 300 * q1 / 0.05 - double(capacity)) / (100 / 0.02 + 300 / 0.05);
  EXPECT_NEAR(double(allocation.truncation_ranks[0]), (q0 - log_lambda) / 0.02, 3.5);
  EXPECT_NEAR(double(allocation.truncation_ranks[1]), (q1 - log_lambda) / 0.05, 3.5);
  EXPECT_LE(allocation.used, capacity);
  EXPECT_GT(allocation.used, capacity - 100);
}

TEST(Allocation, ThePapersConstraintHoldsAndThePriorPullsTowardsTheAverage) {
  const std::vector<Spectrum> matrices = {exponential(1, 0.02, 100), exponential(50, 0.05, 300),
                                          exponential(1e-6, 0.3, 50)};
  const int64_t capacity = 45000;
  const double average = double(capacity) / 450;
  double previous = std::numeric_limits<double>::infinity();
  for (double prior : {0.0, 0.5, 1.0}) {
    const auto allocation = allocate_paper(matrices, capacity, prior);
    EXPECT_LE(cost(matrices, allocation.truncation_ranks), capacity);
    EXPECT_TRUE(allocation.wants_more.empty());
    double distance = 0;
    for (int64_t rank : allocation.truncation_ranks) distance += std::abs(double(rank) - average);
    EXPECT_LE(distance, previous);
    previous = distance;
  }
  EXPECT_EQ(allocate_paper(matrices, capacity, 1.0).truncation_ranks,
            (std::vector<int64_t>{100, 100, 100}));
}

TEST(Allocation, NothingIsSpentOnMatricesThatDidNotChange) {
  Spectrum zero;
  zero.cost = 5;
  zero.largest_rank = 8;
  zero.squares.assign(8, 0.0);
  const std::vector<Spectrum> matrices = {zero, spectrum({4, 2}, 5)};
  EXPECT_EQ(allocate_greedy(matrices, 1000).truncation_ranks, (std::vector<int64_t>{0, 2}));
}

}  // namespace
}  // namespace espalier::compress
