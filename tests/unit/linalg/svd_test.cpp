#include "pipeline/linalg/svd.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::linalg {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
using Values = std::vector<double>;

at::Tensor normal(int64_t rows, int64_t columns, uint64_t seed) {
  at::Tensor x = at::empty({rows, columns}, at::kDouble);
  const CounterRandom random(seed, "test");
  for (int64_t i = 0; i < x.numel(); ++i) x.data_ptr<double>()[i] = random.normal(i);
  return x;
}

/// Orthonormal columns by modified Gram-Schmidt in plain loops, twice.
at::Tensor orthonormal(int64_t rows, int64_t columns, uint64_t seed) {
  at::Tensor q = normal(columns, rows, seed);
  double* x = q.data_ptr<double>();
  for (int pass = 0; pass < 2; ++pass)
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        double dot = 0;
        for (int64_t l = 0; l < rows; ++l) dot += x[i * rows + l] * x[j * rows + l];
        for (int64_t l = 0; l < rows; ++l) x[i * rows + l] -= dot * x[j * rows + l];
      }
      double norm = 0;
      for (int64_t l = 0; l < rows; ++l) norm += x[i * rows + l] * x[i * rows + l];
      for (int64_t l = 0; l < rows; ++l) x[i * rows + l] /= std::sqrt(norm);
    }
  return q.t().contiguous();
}

at::Tensor with_spectrum(int64_t rows, int64_t columns, const Values& s, uint64_t seed) {
  const int64_t k = static_cast<int64_t>(s.size());
  return at::mm(orthonormal(rows, k, seed) * at::tensor(s, at::kDouble),
                orthonormal(columns, k, seed + 1).t());
}

double entry(const at::Tensor& x, int64_t i, int64_t j) { return x[i][j].item<double>(); }

double distance_from_orthonormal(const at::Tensor& x) {
  const int64_t rows = x.size(0), k = x.size(1);
  const at::Tensor c = x.t().contiguous();
  const double* p = c.data_ptr<double>();
  double worst = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double dot = 0;
      for (int64_t l = 0; l < rows; ++l) dot += p[i * rows + l] * p[j * rows + l];
      worst = std::max(worst, std::abs(dot - (i == j)));
    }
  return worst;
}

double residual(const at::Tensor& a, const Svd& svd) {
  const at::Tensor left = at::mm(a, svd.v) - svd.u * svd.s;
  const at::Tensor right = at::mm(a.t(), svd.u) - svd.v * svd.s;
  return std::max(left.norm(2, 0).max().item<double>(), right.norm(2, 0).max().item<double>());
}

void expect_values(const Svd& svd, const Values& s, double tolerance) {
  for (int64_t i = 0; i < svd.s.size(0); ++i)
    EXPECT_NEAR(svd.s[i].item<double>(), i < int64_t(s.size()) ? s[i] : 0.0, tolerance) << i;
}

Values falling(int64_t count, double rate) {
  Values s(count);
  for (int64_t i = 0; i < count; ++i) s[i] = std::pow(rate, double(i));
  return s;
}

TEST(Svd, FullFactorsAreOrthonormalAndRebuildTheMatrixToMultiplesOfEpsilon) {
  for (const auto& [m, n] :
       {std::pair<int64_t, int64_t>{40, 25}, {25, 40}, {1, 9}, {9, 1}, {1, 1}}) {
    const at::Tensor a = normal(m, n, 3);
    const Svd svd = full_svd(a);
    const double bound = 20 * kEpsilon * std::max(m, n);
    EXPECT_LE(distance_from_orthonormal(svd.u), bound);
    EXPECT_LE(distance_from_orthonormal(svd.v), bound);
    EXPECT_LE(residual(a, svd), bound * svd.s[0].item<double>());
    EXPECT_EQ(svd.u.size(1), std::min(m, n));
  }
}

TEST(Svd, FindsAKnownSpectrum) {
  const Values s = falling(60, 0.8);
  const at::Tensor a = with_spectrum(120, 90, s, 5);
  expect_values(full_svd(a), s, 100 * kEpsilon);
  for (int64_t k : {1, 5, 17, 60, 90}) {
    const Svd svd = truncated_svd(a, k, 1);
    expect_values(svd, s, 1e-9);
    EXPECT_LE(residual(a, svd), 1e-5);
    EXPECT_LE(distance_from_orthonormal(svd.u), 1e-12);
    EXPECT_LE(distance_from_orthonormal(svd.v), 1e-12);
  }
}

TEST(Svd, TruncatedMeetsTheResidualItWasAskedOnAllShapesAndTypes) {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{300, 200}, {200, 300}, {1, 50}, {50, 1}})
    for (int64_t k : {1, 8, 30}) {
      if (k > std::min(m, n)) continue;
      const at::Tensor a = normal(m, n, 8).to(at::kFloat);
      const Svd svd = truncated_svd(a, k, 2, 1e-8);
      const at::Tensor reference = std::get<1>(at::linalg_svd(a.to(at::kDouble), false));
      EXPECT_LE(residual(a.to(at::kDouble), svd), 1e-8 * svd.s[0].item<double>());
      EXPECT_LE((svd.s - reference.narrow(0, 0, k)).abs().max().item<double>(),
                1e-9 * svd.s[0].item<double>());
      EXPECT_LE(distance_from_orthonormal(svd.u), 1e-12);
    }
}

TEST(Svd, RepeatedSingularValuesAreAllFound) {
  Values s(40, 2.0);  // more copies than one block of the Krylov space holds
  for (double tail : falling(60, 0.9)) s.push_back(tail);
  const at::Tensor a = with_spectrum(260, 240, s, 11);
  const Svd svd = truncated_svd(a, 45, 4);
  expect_values(svd, s, 1e-9);
  EXPECT_LE(distance_from_orthonormal(svd.u), 1e-12);
  EXPECT_LE(residual(a, svd), 2e-5);
}

TEST(Svd, RankDeficientAndZeroMatricesGiveOrthonormalFactorsAndZeros) {
  const at::Tensor a = with_spectrum(150, 120, {3.0, 1.0, 0.5}, 13);
  for (int64_t k : {2, 10, 100}) {
    const Svd svd = truncated_svd(a, k, 4);
    expect_values(svd, {3.0, 1.0, 0.5}, 1e-7);
    EXPECT_LE(distance_from_orthonormal(svd.u), 1e-12);
    EXPECT_LE(distance_from_orthonormal(svd.v), 1e-10);
  }
  const Svd zero = truncated_svd(at::zeros({150, 120}), 7, 4);
  EXPECT_EQ(zero.s.abs().max().item<double>(), 0.0);
  EXPECT_LE(distance_from_orthonormal(zero.u), 1e-12);
}

TEST(Svd, GivesTheSameBitsEachCallWhateverTheThreadSetting) {
  const at::Tensor a = normal(320, 240, 17);
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  const Svd first = truncated_svd(a, 12, 9);
  EXPECT_EQ(at::get_num_threads(), 2);
  at::set_num_threads(1);
  const Svd second = truncated_svd(a.clone(), 12, 9);
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(first.u, second.u));
  EXPECT_TRUE(at::equal(first.s, second.s));
  EXPECT_TRUE(at::equal(first.v, second.v));
}

TEST(Svd, TheLargestEntryOfEveryLeftVectorIsPositive) {
  const Svd svd = truncated_svd(normal(90, 70, 23), 6, 0);
  for (int64_t j = 0; j < 6; ++j) {
    double largest = 0;
    for (int64_t i = 0; i < 90; ++i)
      if (std::abs(entry(svd.u, i, j)) > std::abs(largest)) largest = entry(svd.u, i, j);
    EXPECT_GT(largest, 0);
  }
}

TEST(Svd, NanAndInfAreRefused) {
  at::Tensor a = normal(30, 20, 1);
  a[3][4] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(full_svd(a), NumericalError);
  EXPECT_THROW(truncated_svd(a, 2, 0), NumericalError);
  a[3][4] = std::numeric_limits<double>::infinity();
  EXPECT_THROW(polar_factor(a), NumericalError);
}

TEST(Svd, TruncatedAgreesWithTheFullDecompositionOnTheShapesOfARealModel) {
  const at::Tensor flat = normal(1536, 576, 29);
  const at::Tensor decaying =
      at::mm(flat * at::pow(at::arange(1, 577, at::kDouble), -0.7), normal(576, 576, 31)) / 24;
  for (const at::Tensor& a : {flat, decaying}) {
    const at::Tensor full = full_svd(a).s;
    const double largest = full[0].item<double>();
    for (int64_t k : {16, 64})
      EXPECT_LE((truncated_svd(a, k, 0).s - full.narrow(0, 0, k)).abs().max().item<double>(),
                1e-5 * largest);
  }
}

TEST(PolarFactor, IsTheNearestMatrixWithOrthonormalColumns) {
  // X = Q H with H symmetric positive definite has the polar factor Q.
  const at::Tensor q = orthonormal(80, 12, 41);
  const at::Tensor b = normal(12, 12, 43);
  const at::Tensor h = at::mm(b, b.t()) + at::eye(12, at::kDouble);
  const at::Tensor w = polar_factor(at::mm(q, h));
  EXPECT_LE((w - q).abs().max().item<double>(), 1e-11);
  EXPECT_LE(distance_from_orthonormal(w), 100 * kEpsilon);
}

TEST(PolarFactor, CompletesRankDeficientColumns) {
  at::Tensor x = normal(50, 6, 47);
  x.select(1, 5).copy_(x.select(1, 0));
  EXPECT_LE(distance_from_orthonormal(polar_factor(x)), 1e-12);
  EXPECT_LE(distance_from_orthonormal(polar_factor(at::zeros({20, 3}))), 1e-12);
}

}  // namespace
}  // namespace espalier::linalg
