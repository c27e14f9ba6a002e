#include "stages/prune/owl.h"

#include <gtest/gtest.h>

#include "problem.h"

namespace espalier::prune {
namespace {

TEST(Owl, TheRatioCountsEntriesAboveAMultipleOfTheBlocksMean) {
  const at::Tensor a = normals("a", 300, 16), b = 3 * normals("b", 7, 40);
  std::vector<float> norms_a(16, 0.5f), norms_b(40, 2.0f);
  norms_b[3] = 50;
  double sum = 0;
  for (int64_t i = 0; i < 300 * 16; ++i) sum += std::abs(a.data_ptr<float>()[i]) * norms_a[i % 16];
  for (int64_t i = 0; i < 7 * 40; ++i) sum += std::abs(b.data_ptr<float>()[i]) * norms_b[i % 40];
  const double mean = sum / (300 * 16 + 7 * 40);
  for (const double factor : {3.0, 5.0, 20.0}) {
    int64_t above = 0;
    for (int64_t i = 0; i < 300 * 16; ++i)
      above += std::abs(a.data_ptr<float>()[i]) * norms_a[i % 16] > factor * mean;
    for (int64_t i = 0; i < 7 * 40; ++i)
      above += std::abs(b.data_ptr<float>()[i]) * norms_b[i % 40] > factor * mean;
    for (const int threads : {1, 2}) {
      Workers workers(threads);
      const std::vector<NormedMatrix> block = {{a, &norms_a}, {b, &norms_b}};
      EXPECT_DOUBLE_EQ(outlier_ratio(block, factor, workers),
                       static_cast<double>(above) / (300 * 16 + 7 * 40));
    }
    EXPECT_GT(above, 0);
  }
}

TEST(Owl, SparsitiesSpanTwiceLambdaAndKeepTheWeightedMean) {
  const std::vector<double> ratios = {0.01, 0.03, 0.02};
  const std::vector<int64_t> parameters = {100, 100, 200};
  const auto sparsities = owl_sparsities(ratios, parameters, 0.7, 0.08);
  // 0, 0.16 and 0.08 denser; their weighted mean is 0.08.
  EXPECT_NEAR(sparsities[0], 0.78, 1e-12);
  EXPECT_NEAR(sparsities[1], 0.62, 1e-12);
  EXPECT_NEAR(sparsities[2], 0.70, 1e-12);
}

TEST(Owl, ASparsityNeverLeavesItsRange) {
  const std::vector<double> ratios = {0, 1, 1, 1};
  const auto sparsities = owl_sparsities(ratios, std::vector<int64_t>(4, 1), 0.97, 0.4);
  for (const double sparsity : sparsities) EXPECT_TRUE(sparsity >= 0 && sparsity < 1) << sparsity;
  EXPECT_GT(sparsities[0], 0.999);
}

TEST(Owl, EqualRatiosGiveTheSameSparsityEverywhere) {
  for (const double sparsity :
       owl_sparsities(std::vector<double>(3, 0.5), std::vector<int64_t>(3, 7), 0.6, 0.08))
    EXPECT_DOUBLE_EQ(sparsity, 0.6);
}

}  // namespace
}  // namespace espalier::prune
