#include "stages/compress/masked.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/unit/compress/models.h"

namespace espalier::compress {
namespace {

using at::Tensor;

struct Case {
  Tensor delta, mask;
};

/// A difference inside a mask of about half of the entries.
Case make_case(int64_t rows, int64_t columns, const Tensor& dense) {
  const Tensor mask = random_matrix(rows, columns, 40) > 0;
  return {dense * mask.to(at::kDouble), mask};
}

double lost_inside(const Case& c, const MaskedFactors& factors) {
  double sum = 0;
  const Tensor low_rank =
      at::mm(factors.u.to(at::kDouble) * factors.s, factors.v.to(at::kDouble).t());
  for (int64_t i = 0; i < c.delta.size(0); ++i)
    for (int64_t j = 0; j < c.delta.size(1); ++j)
      if (c.mask[i][j].item<bool>())
        sum += std::pow(c.delta[i][j].item<double>() - low_rank[i][j].item<double>(), 2);
  return sum;
}

double lost_by_svd(const Case& c, int64_t rank) {
  const auto [u, s, vh] = at::linalg_svd(c.delta, false);
  const Tensor low_rank =
      at::mm(u.narrow(1, 0, rank) * s.narrow(0, 0, rank), vh.narrow(0, 0, rank));
  return ((c.delta - low_rank) * c.mask.to(at::kDouble)).square().sum().item<double>();
}

TEST(Masked, AMatrixOfLowRankIsFoundFromHalfOfItsEntries) {
  const Tensor dense = at::mm(random_matrix(80, 3, 1), random_matrix(3, 60, 2));
  const Case c = make_case(80, 60, dense);
  const MaskedFactors factors = complete(c.delta, c.mask, 3, 80, 7);
  EXPECT_NEAR(lost_inside(c, factors), factors.lost, 1e-4 * dense.square().sum().item<double>());
  EXPECT_LT(factors.lost, 1e-4 * c.delta.square().sum().item<double>());
  const Tensor found = at::mm(factors.u.to(at::kDouble) * factors.s, factors.v.to(at::kDouble).t());
  EXPECT_LT((found - dense).norm().item<double>(), 0.05 * dense.norm().item<double>());
}

TEST(Masked, LosesLessInsideTheMaskThanTheTruncatedSvd) {
  for (const double fall : {0.8, 0.95, 1.0}) {
    const Case c = make_case(70, 90, decaying_matrix(70, 90, 3, fall));
    for (const int64_t rank : {4, 10}) {
      const MaskedFactors factors = complete(c.delta, c.mask, rank, 24, 7);
      EXPECT_NEAR(lost_inside(c, factors), factors.lost, 1e-3 * factors.lost);
      EXPECT_LT(factors.lost, 0.95 * lost_by_svd(c, rank)) << fall << " " << rank;
    }
  }
}

TEST(Masked, TheCurveFallsAndMeetsWhatIsMeasured) {
  const Case c = make_case(120, 90, decaying_matrix(120, 90, 5, 0.93));
  const Decomposition known = masked_decomposition(c.delta, c.mask, 10, 7);
  EXPECT_NEAR(known.energy, c.delta.square().sum().item<double>(), 1e-9 * known.energy);
  EXPECT_EQ(known.values.numel(), known.largest_rank);
  const Spectrum spectrum = spectrum_of(known, 1);
  for (size_t r = 1; r < spectrum.squares.size(); ++r)
    EXPECT_LE(spectrum.squares[r], spectrum.squares[r - 1] * (1 + 1e-12));
  EXPECT_GE(lost_energy(spectrum, known.largest_rank), 0);
  for (const int64_t rank : {5, 10, 15}) {
    const double measured = complete(c.delta, c.mask, rank, 24, 7).lost;
    EXPECT_NEAR(lost_energy(spectrum, rank) / measured, 1, 0.35) << rank;
  }
}

TEST(Masked, TheLargestRankHasFewerParametersThanThereAreEntries) {
  EXPECT_EQ(largest_masked_rank(10, 10, 50), 2);  // 2 * 18 = 36 < 50 <= 3 * 17 = 51
  EXPECT_EQ(largest_masked_rank(10, 10, 52), 3);
  EXPECT_EQ(largest_masked_rank(4, 6, 1), 1);
  EXPECT_LE(largest_masked_rank(4, 6, 24), 4);
}

TEST(Masked, CompletionIsForBasesOfManyZeros) {
  Tensor base = at::ones({16, 16}, at::kFloat);
  base[3][4] = 0;
  EXPECT_FALSE(worth_completing(base));
  base[0].zero_();
  EXPECT_TRUE(worth_completing(base));
}

}  // namespace
}  // namespace espalier::compress
