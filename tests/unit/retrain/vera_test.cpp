#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

MethodCase vera() {
  MethodCase c;
  c.overrides = {"retrain=vera", "retrain.adapter_rank=5"};
  c.formula = [](const Plain& w, const std::vector<Plain>& p, const Frozen& frozen) {
    const Plain a(frozen.at("vera/A")), b(frozen.at("vera/B"));
    Plain out = w;  // diag(b) B diag(d) A
    for (int64_t i = 0; i < w.rows; ++i)
      for (int64_t j = 0; j < w.columns; ++j)
        for (int64_t k = 0; k < a.rows; ++k)
          out.at(i, j) += p[1].values[i] * b.at(i, k) * p[0].values[k] * a.at(k, j);
    return out;
  };
  return c;
}

TEST(Vera, OutputsGradientsAndMergeAreTheFormulas) { expect_follows_formula(vera()); }

TEST(Vera, StartsAsTheFrozenMatrixWithDAtATenth) {
  expect_identity_at_start(vera());
  const MethodAtWork at_work(vera(), {});
  EXPECT_TRUE(at::equal(at_work.parameters->parameters()[0].value.detach(), at::full({5}, 0.1f)));
}

TEST(Vera, TrainsOneNumberARankAndARow) { expect_parameters(vera(), 5 + 12); }

TEST(Vera, MatricesShareTheWidestRandomOnesAndCutThem) {
  const auto method = configured(vera().overrides);
  AttachOptions options;
  options.seed = 5;
  const Target small{"a.weight", 0, at::zeros({4, 6})}, tall{"b.weight", 0, at::zeros({12, 3})};
  const auto adapter = method->attach({small, tall}, options);
  const NamedTensors frozen = adapter->frozen_tensors();
  ASSERT_EQ(frozen.size(), 2u);
  const at::Tensor a = frozen[0].second, b = frozen[1].second;
  EXPECT_EQ(a.sizes(), at::IntArrayRef({5, 6}));
  EXPECT_EQ(b.sizes(), at::IntArrayRef({12, 5}));
  EXPECT_LE(a.abs().max().item<double>(), std::sqrt(6.0 / 6));
  EXPECT_LE(b.abs().max().item<double>(), std::sqrt(6.0 / 5));
  train::ParameterSet parameters(adapter->initial_parameters(5));
  for (float& value : parameters.flat()) value = 1;
  adapter->bind(parameters);
  Workers workers(1);
  adapter->prepare_step(workers);
  EXPECT_TRUE(at::allclose(adapter->merged(0), at::matmul(b.narrow(0, 0, 4), a)));
  EXPECT_TRUE(at::allclose(adapter->merged(1), at::matmul(b, a.narrow(1, 0, 3))));
}

TEST(Vera, BadKeysAreRefused) {
  expect_refused({"retrain=vera", "retrain.adapter_rank=0"}, {"retrain.adapter_rank"});
  expect_refused({"retrain=vera", "retrain.d_initial=much"}, {"retrain.d_initial"});
}

}  // namespace
}  // namespace espalier::retrain
