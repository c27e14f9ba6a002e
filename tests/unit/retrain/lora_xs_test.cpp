#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

MethodCase lora_xs(std::vector<std::string> more = {}) {
  MethodCase c;
  c.overrides = {"retrain=lora_xs", "retrain.adapter_rank=3", "retrain.scale=1.5"};
  c.overrides.insert(c.overrides.end(), more.begin(), more.end());
  c.formula = [](const Plain& w, const std::vector<Plain>& p, const Frozen& frozen) {
    Plain up, down;
    for (const auto& [name, base] : frozen) (name.ends_with("/up") ? up : down) = Plain(base);
    const Plain added = times(times(up, turned_around(p[0])), down);  // P R^T Sigma Q^T
    Plain out = w;
    for (size_t i = 0; i < out.values.size(); ++i) out.values[i] += 1.5 * added.values[i];
    return out;
  };
  return c;
}

TEST(LoraXs, OutputsGradientsAndMergeAreTheFormulas) {
  expect_follows_formula(lora_xs());
  expect_follows_formula(lora_xs({"retrain.init=random"}));
  expect_follows_formula(lora_xs({"retrain.scale=null", "retrain.alpha=4.5"}));  // 4.5 / 3
}

at::Tensor base(const MethodAtWork& at_work, const std::string& which) {
  return at_work.frozen_.at(at_work.target.name + which).to(at::kDouble);
}

/// The product of the bases is the part of W that its singular vectors first .. first + 2 span.
void expect_part_of_weight(const std::string& subspace, int64_t first) {
  const MethodAtWork at_work(lora_xs({"retrain.subspace=" + subspace}), {});
  const auto [u, s, vt] = at::linalg_svd(at_work.target.weight.to(at::kDouble), false);
  const at::Tensor part =
      at::matmul(u.narrow(1, first, 3) * s.narrow(0, first, 3), vt.narrow(0, first, 3));
  const at::Tensor ours = at::matmul(base(at_work, "/up"), base(at_work, "/down"));
  EXPECT_LT((ours - part).norm().item<double>(), 1e-4 * part.norm().item<double>()) << subspace;
}

TEST(LoraXs, BasesAreTheSingularVectorsAskedFor) {
  expect_part_of_weight("top", 0);
  expect_part_of_weight("middle", 2);
  expect_part_of_weight("bottom", 5);
}

TEST(LoraXs, SigmaStandsOnTheInputSideOrIsLeftOut) {
  const MethodAtWork with(lora_xs(), {}), without(lora_xs({"retrain.sigma=false"}), {});
  const at::Tensor s = std::get<1>(at::linalg_svd(with.target.weight.to(at::kDouble), false));
  const at::Tensor identity = at::eye(3, at::kDouble);
  const auto gram = [](const at::Tensor& rows) { return at::matmul(rows, rows.t()); };
  EXPECT_TRUE(at::allclose(gram(base(with, "/up").t()), identity, 0, 1e-5));
  EXPECT_TRUE(at::allclose(gram(base(without, "/down")), identity, 0, 1e-5));
  EXPECT_TRUE(
      at::allclose(gram(base(with, "/down")), s.narrow(0, 0, 3).square().diag(), 1e-4, 1e-4));
}

TEST(LoraXs, TheRandomStartsAreThePapers) {
  const MethodAtWork random(lora_xs({"retrain.init=random"}), {});
  EXPECT_LE(base(random, "/down").abs().max().item<double>(), 1 / std::sqrt(3));
  EXPECT_GT(base(random, "/down").abs().max().item<double>(), 0.7 / std::sqrt(3));
  EXPECT_LE(base(random, "/up").abs().max().item<double>(), 1 / std::sqrt(12));
  const MethodAtWork of_random(lora_xs({"retrain.init=svd_random"}), {});
  const at::Tensor up = base(of_random, "/up");
  EXPECT_TRUE(at::allclose(at::matmul(up.t(), up), at::eye(3, at::kDouble), 0, 1e-5));
  EXPECT_FALSE(at::allclose(up, base(MethodAtWork(lora_xs(), {}), "/up"), 0, 1e-2));
}

TEST(LoraXs, StartsWithinRoundingOfTheFrozenMatrix) {
  const MethodAtWork at_work(lora_xs(), {});
  const at::Tensor r = at_work.parameters->parameters()[0].value.detach();
  EXPECT_LT(r.abs().max().item<double>(), 5e-5);
  EXPECT_GT(r.abs().max().item<double>(), 5e-6);
  EXPECT_TRUE(at::allclose(at_work.adapter->merged(0), at_work.target.weight, 1e-3, 1e-3));
}

TEST(LoraXs, TrainsRankSquared) { expect_parameters(lora_xs(), 9); }

TEST(LoraXs, StoredBasesAreUsedInsteadOfADecomposition) {
  const MethodCase c = lora_xs();
  AttachOptions options;
  options.frozen[c.name + "/down"] = at::randn({3, 8});
  options.frozen[c.name + "/up"] = at::randn({12, 3});
  const auto method = configured(c.overrides);
  const Target target{c.name, 0, at::randn({12, 8})};
  for (const auto& [name, tensor] : method->attach({target}, options)->frozen_tensors())
    EXPECT_TRUE(at::equal(tensor, options.frozen.at(name))) << name;
  options.frozen[c.name + "/up"] = at::randn({11, 3});
  EXPECT_NE(refusal_of([&] { method->attach({target}, options); }).find("[11, 3]"),
            std::string::npos);
  options.frozen.erase(c.name + "/up");
  EXPECT_NE(refusal_of([&] { method->attach({target}, options); }).find("no tensor"),
            std::string::npos);
}

TEST(LoraXs, BadRanksAndContradictionsAreRefused) {
  expect_shape_refused({"retrain=lora_xs", "retrain.adapter_rank=9"}, 12, 8, {"adapter_rank = 9"});
  expect_refused({"retrain=lora_xs", "retrain.init=zero"}, {"retrain.init", "svd"});
  expect_refused({"retrain=lora_xs", "retrain.subspace=lowest"}, {"retrain.subspace", "bottom"});
  expect_refused({"retrain=lora_xs", "retrain.init=random", "retrain.sigma=false"},
                 {"retrain.sigma"});
  expect_refused({"retrain=lora_xs", "retrain.init=random", "retrain.subspace=middle"},
                 {"retrain.subspace"});
}

}  // namespace
}  // namespace espalier::retrain
