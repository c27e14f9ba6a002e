// Training whole tensors: gradients, masks that move, and every kind of tensor of a model.
#include "stages/retrain/full.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "pipeline/errors.h"
#include "stages/retrain/merge.h"
#include "tests/unit/retrain/tiny_llama.h"

namespace espalier::retrain {
namespace {

double distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm()).item<double>();
}

/// One matrix, its gradient by apply() and autograd, and the parts to say what it should be.
struct OneMatrix {
  at::Tensor weight, x, dy;
  std::unique_ptr<Adapter> adapter;
  std::unique_ptr<train::ParameterSet> parameters;

  OneMatrix(const FullOptions& options, bool masked) {
    at::manual_seed(1);
    weight = at::randn({12, 20}).mul(at::rand({12, 20}).gt(0.5));
    x = at::randn({7, 20});
    dy = at::randn({7, 12});
    Target target{"w", 0, weight};
    if (masked) target.kept = weight.ne(0).to(at::kByte);
    adapter = make_full(options)->attach({target}, {});
    parameters = std::make_unique<train::ParameterSet>(adapter->initial_parameters(0));
    adapter->bind(*parameters);
    Workers workers(1);
    for (float& value : parameters->flat()) value += 0.25f;
    adapter->prepare_step(workers);
  }
  at::Tensor value() const { return parameters->parameters()[0].value.detach(); }
  at::Tensor gradient(int64_t counted) const {
    UnitKey key;
    key.counted = counted;
    const at::Tensor y = adapter->apply(0, x, {}, key);
    return torch::autograd::grad({y}, {parameters->parameters()[0].value}, {dy})[0];
  }
  /// dL/d(what acts), by autograd in float64.
  at::Tensor weight_gradient(const at::Tensor& acting) const {
    const at::Tensor w = acting.to(at::kDouble).set_requires_grad(true);
    const at::Tensor y = at::matmul(x.to(at::kDouble), w.t());
    return torch::autograd::grad({y}, {w}, {dy.to(at::kDouble)})[0];
  }
};

TEST(Full, AFixedMaskKeepsZerosInForwardGradientAndMerge) {
  const OneMatrix one({}, true);
  const at::Tensor kept = one.weight.ne(0);
  EXPECT_TRUE(at::equal(one.adapter->merged(0), one.value() * kept));
  EXPECT_LT(distance(one.gradient(1), one.weight_gradient(one.value() * kept) * kept), 1e-6);
  EXPECT_TRUE(
      at::equal(one.gradient(1).ne(0).logical_and(kept.logical_not()), at::zeros_like(kept)));
}

TEST(Full, WithoutAMaskTheGradientIsThatOfTheWeight) {
  const OneMatrix one({}, false);
  EXPECT_LT(distance(one.gradient(1), one.weight_gradient(one.value())), 1e-6);
}

TEST(Full, StraightThroughGradientsReachEveryWeightAndSrSteAddsItsDecay) {
  FullOptions options;
  options.mask = FullOptions::Mask::ste;
  options.keep = 2;
  options.group = 4;
  const OneMatrix ste(options, false);
  const at::Tensor mask = chosen_mask(ste.value(), 2, 4, 0);
  EXPECT_TRUE(at::equal(ste.adapter->merged(0), ste.value() * mask));
  const at::Tensor dense = ste.weight_gradient(ste.value() * mask);
  EXPECT_LT(distance(ste.gradient(5), dense), 1e-6);
  options.mask = FullOptions::Mask::sr_ste;
  options.decay = 0.5;
  const OneMatrix sr_ste(options, false);
  const at::Tensor decayed = sr_ste.value().to(at::kDouble) * mask.logical_not() * 0.5 * 5;
  EXPECT_LT(distance(sr_ste.gradient(5), dense + decayed), 1e-6);
}

TEST(Full, AChosenMaskKeepsTheLargestAndTiesFallToTheLowerIndex) {
  const at::Tensor w = at::tensor({3.f, -1.f, 1.f, 2.f, 1.f, 1.f, 1.f, -1.f}).view({2, 4});
  const auto mask = [&](int64_t keep, int64_t group, double sparsity) {
    const at::Tensor m = chosen_mask(w, keep, group, sparsity).view({-1}).to(at::kLong);
    return std::vector<int64_t>(m.const_data_ptr<int64_t>(), m.const_data_ptr<int64_t>() + 8);
  };
  EXPECT_EQ(mask(2, 4, 0), (std::vector<int64_t>{1, 0, 0, 1, 0, 0, 1, 1}));
  EXPECT_EQ(mask(0, 0, 0.5), (std::vector<int64_t>{1, 0, 0, 1, 0, 0, 1, 1}));
  EXPECT_EQ(mask(0, 0, 0.0), (std::vector<int64_t>(8, 1)));
}

/// The whole tiny llama trained: its matrices, norms, and the tied embedding.
struct WholeModel {
  std::filesystem::path directory;
  io::Checkpoint checkpoint;
  model::Architecture architecture;
  data::TrainingSampler sampler;
  AdaptedModel model;
  std::unique_ptr<train::ParameterSet> parameters;
  Workers workers{1};

  static std::filesystem::path write(const std::string& name) {
    const auto directory = std::filesystem::path(testing::TempDir()) / ("full_" + name);
    write_tiny_llama(directory);
    write_tiny_text(directory / "text.h5");
    return directory;
  }
  WholeModel(const std::string& name, const std::vector<std::string>& targets)
      : directory(write(name)),
        checkpoint(io::Checkpoint::open(directory)),
        architecture(model::read_architecture(checkpoint)),
        sampler(data::TokenSet::open(directory / "text.h5"), 1, 24, true),
        model(checkpoint, architecture, at::kFloat, *make_full({}), targets),
        parameters(model.make_parameters(3)) {
    model.adapter().prepare_step(workers);
  }
  double loss() {
    model.adapter().prepare_step(workers);
    return model.evaluate(sampler.batch(0, 2), {1, 0, 0, 2}).loss.loss;
  }
  std::map<std::string, at::Tensor> gradients(bool recompute = false) const {
    std::map<std::string, at::Tensor> all;
    model.loss_and_gradients(sampler.batch(0, 2), {1, 0, 0, 2}, recompute,
                             [&](int64_t p, const at::Tensor& g) {
                               const std::string& name = parameters->parameters()[p].name;
                               EXPECT_EQ(all.count(name), 0u) << name;
                               all[name] = g.detach().clone();
                             });
    return all;
  }
};

TEST(Full, TheGradientOfEveryTensorIsTheSlopeOfTheLoss) {
  WholeModel whole("slopes", {});
  const auto gradients = whole.gradients();
  EXPECT_EQ(gradients.size(), whole.parameters->parameters().size());
  EXPECT_EQ(gradients.count("model.embed_tokens.weight/value"), 1u);
  EXPECT_EQ(gradients.count("model.norm.weight/value"), 1u);
  for (const train::Parameter& p : whole.parameters->parameters()) {
    const at::Tensor value = p.value.detach(), start = value.clone();
    const at::Tensor direction = gradients.at(p.name) / gradients.at(p.name).norm();
    const double step = 2e-3;
    value.copy_(start + step * direction);
    const double up = whole.loss();
    value.copy_(start - step * direction);
    const double down = whole.loss();
    value.copy_(start);
    const double slope = gradients.at(p.name).norm().item<double>();
    EXPECT_NEAR((up - down) / (2 * step), slope, 0.02 * slope + 1e-3) << p.name;
  }
}

TEST(Full, ActivationCheckpointingGivesTheSameBits) {
  const WholeModel whole("recompute", {});
  const auto kept = whole.gradients(false), recomputed = whole.gradients(true);
  for (const auto& [name, gradient] : kept)
    EXPECT_TRUE(at::equal(gradient, recomputed.at(name))) << name;
}

TEST(Full, GlobsChooseAnyTensorAndNothingElseIsTrained) {
  const WholeModel norms("norms", {"*layernorm", "model.norm.weight"});
  EXPECT_EQ(norms.model.targets().size(), 0u);
  EXPECT_EQ(norms.parameters->size(), (2 * kBlocks + 1) * kHidden);
  EXPECT_EQ(norms.gradients().size(), 2u * kBlocks + 1);
  const WholeModel top("top", {"model.layers.2.*"});
  EXPECT_EQ(top.model.targets().size(), 7u);
  EXPECT_EQ(top.gradients().size(), 9u);
}

TEST(Full, WhatWasTrainedIsWritten) {
  WholeModel whole("written", {});
  for (float& value : whole.parameters->flat()) value *= 1.01f;
  const double trained = whole.loss();
  const auto out = whole.directory / "model";
  write_model(out, whole.checkpoint, whole.model, Merge::masked, whole.workers,
              comm::Communicator::self());
  const io::Checkpoint written = io::Checkpoint::open(out);
  AdaptedModel again(written, whole.architecture, at::kFloat, *make_full({}), {});
  const auto parameters = again.make_parameters(0);
  again.adapter().prepare_step(whole.workers);
  EXPECT_EQ(again.evaluate(whole.sampler.batch(0, 2), {1, 0, 0, 2}).loss.loss, trained);
  for (const std::string& name : written.names())
    EXPECT_FALSE(at::equal(written.view(name), whole.checkpoint.view(name))) << name;
}

}  // namespace
}  // namespace espalier::retrain
