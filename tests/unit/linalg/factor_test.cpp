#include "pipeline/linalg/factor.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::linalg {
namespace {

at::Tensor random_gram(int64_t n, int64_t tokens) {
  const CounterRandom random(5, "gram");
  at::Tensor x = at::empty({tokens, n}, at::kDouble);
  double* values = x.data_ptr<double>();
  for (int64_t i = 0; i < tokens * n; ++i) values[i] = random.normal(i) * (1 + i % n % 7);
  return at::mm(x.t(), x).mul_(2.0 / static_cast<double>(tokens));
}

at::Tensor damped(const at::Tensor& gram, double damping) {
  return gram + at::eye(gram.size(0), gram.options()) * damping * gram.diagonal().mean();
}

TEST(InverseFactor, TransposeTimesItselfIsTheInverseOfTheDampedGram) {
  for (const int64_t n : {1, 2, 127, 128, 129, 300}) {
    at::Tensor gram = random_gram(n, n + 20);
    const at::Tensor h = damped(gram, 0.01);
    FactorReport report;
    const at::Tensor r = inverse_factor(gram, 0.01, "block 0 q_proj", report).to(at::kDouble);
    const at::Tensor residual = r.t().mm(r).mm(h) - at::eye(n, h.options());
    // float32 rounding of R, seen through H's condition number.
    EXPECT_LT(residual.abs().max().item<double>(), 2e-4) << n;
    EXPECT_EQ(r.tril(-1).abs().max().item<double>(), 0) << n;
    EXPECT_GT(r.diagonal().min().item<double>(), 0) << n;
    EXPECT_EQ(report.damping, 0.01);
    EXPECT_EQ(report.times_raised, 0);
  }
}

TEST(InverseFactor, IsTheCholeskyFactorOfTheInverse) {
  at::Tensor gram = random_gram(200, 300);
  const at::Tensor inverse = at::inverse(damped(gram, 0.01));
  const at::Tensor published = at::linalg_cholesky(inverse, true);
  FactorReport report;
  const at::Tensor r = inverse_factor(gram, 0.01, "", report);
  EXPECT_LT((r - published).abs().max().item<double>(),
            1e-6 * published.abs().max().item<double>());
}

TEST(InverseFactor, DeadInputsAreReportedAndStandAlone) {
  at::Tensor gram = random_gram(6, 40);
  for (const int64_t dead : {1, 4}) {
    gram.select(0, dead).zero_();
    gram.select(1, dead).zero_();
  }
  FactorReport report;
  const at::Tensor r = inverse_factor(gram, 0.01, "", report);
  EXPECT_EQ(report.dead_inputs, (std::vector<int64_t>{1, 4}));
  EXPECT_EQ(gram[4][4].item<double>(), 1);
  const double shift = 0.01 * gram.diagonal().mean().item<double>();
  EXPECT_NEAR(r[4][4].item<double>(), 1 / std::sqrt(1 + shift), 1e-6);
  EXPECT_EQ(r[4][5].item<double>(), 0);
}

TEST(InverseFactor, DampingIsRaisedTenfoldUntilTheMatrixIsPositiveDefinite) {
  at::Tensor gram = at::eye(3, at::kDouble);
  gram[0][1] = gram[1][0] = 1.5;  // eigenvalues 2.5, 1, -0.5: needs damping above 0.5
  FactorReport report;
  inverse_factor(gram, 0.01, "", report);
  EXPECT_EQ(report.times_raised, 2);
  EXPECT_DOUBLE_EQ(report.damping, 1.0);
}

TEST(InverseFactor, AMatrixThatStaysIndefiniteIsAnErrorThatNamesIt) {
  at::Tensor gram = at::eye(3, at::kDouble);
  gram[0][1] = gram[1][0] = 1000;
  FactorReport report;
  try {
    inverse_factor(gram, 0.01, "block 3 self_attn.q_proj", report);
    FAIL();
  } catch (const NumericalError& error) {
    EXPECT_NE(std::string(error.what()).find("block 3 self_attn.q_proj"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("not positive definite"), std::string::npos);
  }
  EXPECT_EQ(report.times_raised, 4);
}

TEST(InverseFactor, NanAndInfinityAreErrorsThatNameTheEntry) {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    at::Tensor gram = at::eye(3, at::kDouble);
    gram[1][2] = bad;
    FactorReport report;
    try {
      inverse_factor(gram, 0.01, "block 7 down_proj", report);
      FAIL();
    } catch (const NumericalError& error) {
      EXPECT_NE(std::string(error.what()).find("block 7 down_proj"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find("(1, 2)"), std::string::npos);
    }
  }
}

TEST(InverseFactor, TheSameGramGivesTheSameBits) {
  const at::Tensor gram = random_gram(300, 400);
  FactorReport report;
  at::Tensor a = gram.clone(), b = gram.clone();
  EXPECT_TRUE(inverse_factor(a, 0.01, "", report).equal(inverse_factor(b, 0.01, "", report)));
}

}  // namespace
}  // namespace espalier::linalg
