#include "pipeline/linalg/double_product.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pipeline/random.h"

namespace espalier::linalg {
namespace {

at::Tensor normals(const std::string& purpose, int64_t rows, int64_t columns) {
  const CounterRandom random(29, purpose);
  at::Tensor t = at::empty({rows, columns}, at::kDouble);
  for (int64_t i = 0; i < t.numel(); ++i) t.data_ptr<double>()[i] = random.normal(i);
  return t;
}

DoubleView view_of(const at::Tensor& t) { return {t.data_ptr<double>(), t.stride(0)}; }

TEST(DoubleProduct, IsTorchsProductForEveryShapeAndInsideLargerMatrices) {
  for (const int64_t m : {1, 4, 7, 130})
    for (const int64_t n : {1, 16, 21, 64})
      for (const int64_t k : {1, 128, 300}) {
        const at::Tensor a = normals("a", m, k + 3).slice(1, 1, k + 1);
        const at::Tensor b = normals("b", k, n + 2).slice(1, 2, n + 2);
        const at::Tensor transposed = b.t().contiguous();
        const at::Tensor outside = normals("c", m, n + 5), expected = outside.clone();
        const at::Tensor again = outside.clone();
        expected.slice(1, 3, n + 3).sub_(at::mm(a, b));
        subtract_product(view_of(outside).block(0, 3), view_of(a), view_of(b), false, m, n, k);
        subtract_product(view_of(again).block(0, 3), view_of(a), view_of(transposed), true, m, n,
                         k);
        EXPECT_LT((outside - expected).abs().max().item<double>(), 1e-12)
            << m << " " << n << " " << k;
        EXPECT_TRUE(outside.equal(again));
      }
}

}  // namespace
}  // namespace espalier::linalg
