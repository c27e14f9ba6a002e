#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

MethodCase lora(const std::string& method) {
  MethodCase c;
  c.overrides = {"retrain=" + method, "retrain.adapter_rank=3", "retrain.alpha=6"};
  c.formula = [](const Plain& w, const std::vector<Plain>& p, const Frozen&) {
    Plain out = w;
    const Plain added = times(p[1], p[0]);  // B A
    for (size_t i = 0; i < out.values.size(); ++i) out.values[i] += 6.0 / 3.0 * added.values[i];
    return out;
  };
  return c;
}

TEST(Lora, OutputsGradientsAndMergeAreTheFormulas) {
  expect_follows_formula(lora("lora"));
  expect_follows_formula(lora("lora_masked"));
}

TEST(Lora, StarTrainsWithoutTheMaskAndMergesInsideIt) {
  MethodAtWork star(lora("lora_star"), {at::kFloat, true, 0.3});
  MethodAtWork free(lora("lora"), {at::kFloat, false, 0.3});
  free.target.weight = star.target.weight;  // the same sparse matrix, no mask asked for
  AttachOptions options;
  options.merge = Merge::dense;
  free.adapter = free.method->attach({free.target}, options);
  free.adapter->bind(*free.parameters);
  star.move_away();
  free.move_away();
  EXPECT_TRUE(at::equal(star.adapter->apply(0, star.x, {}, star.key),
                        free.adapter->apply(0, star.x, {}, star.key)));
  EXPECT_TRUE(at::equal(star.adapter->merged(0), free.adapter->merged(0).mul(star.target.kept)));
}

TEST(Lora, StartsAsTheFrozenMatrix) {
  for (const char* method : {"lora", "lora_masked", "lora_star"})
    expect_identity_at_start(lora(method));
}

TEST(Lora, TrainsRankTimesBothSides) {
  for (const char* method : {"lora", "lora_masked", "lora_star"})
    expect_parameters(lora(method), 3 * (12 + 8));
}

TEST(Lora, WhatStaysBesideIsTheMergedChange) {
  MethodAtWork at_work(lora("lora"), {});
  at_work.move_away();
  const auto terms = at_work.adapter->beside(0);
  ASSERT_TRUE(terms);
  const at::Tensor sum = at_work.target.weight + terms->scale * at::matmul(terms->up, terms->down);
  EXPECT_TRUE(at::allclose(at_work.adapter->merged(0), sum, 1e-5, 1e-6));
}

TEST(Lora, TheBiasIsAddedAndNothingIsDroppedWhileEvaluating) {
  MethodAtWork at_work(lora("lora"), {at::kFloat, false, 0.3});
  at_work.move_away();
  UnitKey evaluating = at_work.key;
  evaluating.evaluating = true;
  const at::Tensor bias = at::randn({12});
  const at::Tensor y = at_work.adapter->apply(0, at_work.x, bias, evaluating);
  const at::Tensor whole = at::matmul(at_work.x, at_work.adapter->merged(0).t()) + bias;
  EXPECT_TRUE(at::allclose(y, whole, 1e-4, 1e-5));
}

TEST(Lora, BadRanksAndContradictionsAreRefused) {
  expect_shape_refused({"retrain=lora", "retrain.adapter_rank=9"}, 12, 8,
                       {"adapter_rank = 9", "8"});
  expect_refused({"retrain=lora", "retrain.adapter_rank=0"}, {"retrain.adapter_rank"});
  expect_refused({"retrain=lora", "retrain.alpha=-1"}, {"retrain.alpha"});
  expect_refused({"retrain=lora_masked", "retrain.merge=dense"}, {"retrain.merge", "lora_masked"});
  expect_refused({"retrain=lora_star", "retrain.merge=beside"}, {"retrain.merge", "lora_star"});
}

}  // namespace
}  // namespace espalier::retrain
