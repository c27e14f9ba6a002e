// Products against plain float64 loops. CMake runs this file's tests a second time as a processor
// below AVX-512 computes them (ONEDNN_MAX_CPU_ISA).
#include "pipeline/linalg/product.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace espalier::linalg {
namespace {

/// The rounding of the result to 24 or 8 significant bits, and that of float32 sums.
double bound(at::ScalarType out, double exact, double magnitude, int64_t terms) {
  const double half = out == at::kFloat ? std::ldexp(1.0, -24) : std::ldexp(1.0, -8);
  return half * std::abs(exact) + std::ldexp(static_cast<double>(terms + 2), -24) * magnitude;
}

/// got[i, j] = sum_k a[i, k] b[k, j] + bias[j].
void expect_product(const at::Tensor& got, const at::Tensor& a, const at::Tensor& b,
                    const at::Tensor& bias = {}) {
  const at::Tensor left = a.to(at::kDouble), right = b.to(at::kDouble), wide = got.to(at::kDouble);
  const auto x = left.accessor<double, 2>(), y = right.accessor<double, 2>(),
             z = wide.accessor<double, 2>();
  ASSERT_EQ(got.size(0), a.size(0));
  ASSERT_EQ(got.size(1), b.size(1));
  for (int64_t i = 0; i < got.size(0); ++i)
    for (int64_t j = 0; j < got.size(1); ++j) {
      double exact = bias.defined() ? bias[j].item<double>() : 0;
      double magnitude = std::abs(exact);
      for (int64_t k = 0; k < a.size(1); ++k) {
        exact += x[i][k] * y[k][j];
        magnitude += std::abs(x[i][k] * y[k][j]);
      }
      ASSERT_LE(std::abs(z[i][j] - exact), bound(got.scalar_type(), exact, magnitude, a.size(1)))
          << "at " << i << ", " << j;
    }
}

at::Tensor random(at::IntArrayRef shape, at::ScalarType type) {
  return at::randn(shape, at::kFloat).to(type);
}

class Product : public testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    at::manual_seed(3);
    one_library_thread();
  }
};

TEST_P(Product, IsTheRoundedSumWhateverTheOutputsTypeAndTheOperandsLayout) {
  const at::Tensor a = random({33, 70}, GetParam()), b = random({70, 21}, GetParam());
  const at::Tensor a_turned = a.t().contiguous().t(), b_turned = b.t().contiguous().t();
  for (const at::ScalarType out : {at::kFloat, at::kBFloat16})
    for (const at::Tensor& left : {a, a_turned})
      for (const at::Tensor& right : {b, b_turned}) expect_product(product(left, right, out), a, b);
}

TEST_P(Product, IntoAPartOfATensorLeavesTheRestAlone) {
  const at::Tensor a = random({16, 40}, GetParam()), b = random({40, 24}, GetParam());
  at::Tensor whole = at::full({16, 64}, 7, GetParam());
  at::Tensor part = whole.narrow(1, 8, 24);
  product_into(part, a, b);
  expect_product(part, a, b);
  EXPECT_TRUE(whole.narrow(1, 0, 8).eq(7).all().item<bool>());
  EXPECT_TRUE(whole.narrow(1, 32, 32).eq(7).all().item<bool>());
}

TEST_P(Product, OfABatchIsEachProduct) {
  const at::Tensor a = random({5, 12, 30}, GetParam()), b = random({5, 18, 30}, GetParam());
  at::Tensor out = at::empty({5, 12, 18}, GetParam());
  batched_product_into(out, a, b.transpose(1, 2));
  for (int64_t i = 0; i < 5; ++i) expect_product(out[i], a[i], b[i].t());
}

TEST_P(Product, LinearAddsTheBiasBeforeItRounds) {
  const at::Tensor x = random({19, 48}, GetParam()), weight = random({27, 48}, GetParam()),
                   bias = random({27}, GetParam());
  expect_product(linalg::linear(x, weight, bias), x, weight.t(), bias);
  expect_product(linalg::linear(x, weight), x, weight.t());
}

TEST_P(Product, LinearsGradientIsTheProductWithTheWeight) {
  const at::Tensor weight = random({27, 48}, GetParam()), dy = random({19, 27}, GetParam());
  const at::Tensor x = random({19, 48}, GetParam()).set_requires_grad(true);
  linalg::linear(x, weight).backward(dy);
  expect_product(x.grad(), dy, weight);
}

TEST_P(Product, AGramIsTheProductWithTheTransposeOnAndAboveTheDiagonal) {
  const at::Tensor x = random({50, 410}, GetParam());
  at::Tensor gram = at::zeros({410, 410}, at::kFloat);
  gram_into(gram, x);
  const at::Tensor mirrored = gram.triu() + gram.triu(1).t();
  expect_product(mirrored, x.t(), x);
}

INSTANTIATE_TEST_SUITE_P(Types, Product, testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

}  // namespace
}  // namespace espalier::linalg
