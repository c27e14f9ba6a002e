#include "stages/retrain/spp.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/random.h"
#include "stages/retrain/dropout.h"

namespace espalier::retrain {
namespace {

constexpr int64_t kOut = 24, kIn = 37, kTokens = 10;

/// SPP on one sparse matrix, with parameters moved away from the start.
struct Fixture {
  std::unique_ptr<Adapter> adapter;
  std::unique_ptr<train::ParameterSet> parameters;
  at::Tensor weight, x, dy;
  SppOptions options;
  UnitKey key{7, 3, 0, 2};

  Fixture(const SppOptions& options, at::ScalarType type) : options(options) {
    at::manual_seed(1);
    weight = at::randn({kOut, kIn}).mul(at::rand({kOut, kIn}).gt(0.5)).to(type);
    x = at::randn({kTokens, kIn}).to(type);
    dy = at::randn({kTokens, kOut}).to(type);
    adapter = make_spp(options)->attach({{"w", 0, weight}}, {});
    parameters = std::make_unique<train::ParameterSet>(adapter->initial_parameters(5));
    adapter->bind(*parameters);
    prepare();
  }
  void move_away() {
    for (size_t i = 0; i < parameters->flat().size(); ++i)
      parameters->flat()[i] += static_cast<float>(0.3 * CounterRandom(2, "move").normal(i));
    prepare();
  }
  void prepare() {
    Workers workers(1);
    adapter->prepare_step(workers);
  }
  at::Tensor alpha() const { return parameters->parameters()[0].value; }
  at::Tensor beta() const { return parameters->parameters()[1].value; }

  /// The published formulation (eq. 7, W' formed plainly) by ATen's autograd in float64.
  at::Tensor published(const at::Tensor& input, const at::Tensor& a, const at::Tensor& b) const {
    const at::Tensor w = weight.to(at::kDouble);
    const at::Tensor grown = at::repeat_interleave(a, kOut / options.groups, 0);
    at::Tensor added = w * grown;
    if (b.defined()) added = added * b.unsqueeze(1);
    if (!options.residual) return at::matmul(input, added.t());
    // Dropout is linear: its mask is found by sending ones through it.
    const at::Tensor mask = options.dropout > 0
                                ? dropout(at::ones({kTokens, kIn}), options.dropout, key, "w")
                                : at::ones({kTokens, kIn});
    return at::matmul(input, w.t()) +
           options.scale * at::matmul(input * mask.to(at::kDouble), added.t());
  }
};

struct Gradients {
  at::Tensor y, x, alpha, beta;
};

Gradients ours(const Fixture& f) {
  const at::Tensor x = f.x.detach().clone().set_requires_grad(true);
  const at::Tensor y = f.adapter->apply(0, x, {}, f.key);
  std::vector<at::Tensor> inputs = {x, f.alpha()};
  if (f.options.beta) inputs.push_back(f.beta());
  const auto g = torch::autograd::grad({y}, inputs, {f.dy});
  return {y.detach(), g[0], g[1], f.options.beta ? g[2] : at::Tensor()};
}

Gradients theirs(const Fixture& f) {
  const at::Tensor x = f.x.to(at::kDouble).set_requires_grad(true);
  const at::Tensor a = f.alpha().detach().to(at::kDouble).set_requires_grad(true);
  at::Tensor b;
  std::vector<at::Tensor> inputs = {x, a};
  if (f.options.beta)
    inputs.push_back(b = f.beta().detach().to(at::kDouble).set_requires_grad(true));
  const at::Tensor y = f.published(x, a, b);
  const auto g = torch::autograd::grad({y}, inputs, {f.dy.to(at::kDouble)});
  return {y.detach(), g[0], g[1], f.options.beta ? g[2] : at::Tensor()};
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm()).item<double>();
}

void expect_same_gradients(const SppOptions& options, at::ScalarType type, double tolerance) {
  Fixture f(options, type);
  f.move_away();
  const Gradients a = ours(f), b = theirs(f);
  EXPECT_LT(distance(a.y, b.y), tolerance);
  EXPECT_LT(distance(a.x, b.x), tolerance);
  EXPECT_LT(distance(a.alpha, b.alpha), tolerance);
  if (options.beta) {
    EXPECT_LT(distance(a.beta, b.beta), tolerance);
  }
}

SppOptions small() {
  SppOptions options;
  options.groups = 4;
  options.dropout = 0;
  return options;
}

TEST(Spp, OutputsAndGradientsAreThePublishedFormulations) {
  expect_same_gradients(small(), at::kFloat, 2e-6);
  expect_same_gradients(small(), at::kBFloat16, 8e-3);
}

TEST(Spp, WithDropoutToo) {
  SppOptions options = small();
  options.dropout = 0.3;
  expect_same_gradients(options, at::kFloat, 2e-6);
  expect_same_gradients(options, at::kBFloat16, 8e-3);
}

TEST(Spp, NothingIsDroppedOnEitherWayWhereAUnitOnlyMeasures) {
  SppOptions options = small();
  options.dropout = 0.3;
  Fixture f(options, at::kFloat);
  f.key.evaluating = true;
  f.move_away();
  const Gradients a = ours(f), b = theirs(f);
  EXPECT_LT(distance(a.y, b.y), 2e-6);
  EXPECT_LT(distance(a.x, b.x), 2e-6);
  EXPECT_LT(distance(a.alpha, b.alpha), 2e-6);
}

TEST(Spp, TheAblationsToo) {
  SppOptions options = small();
  options.beta = false;
  expect_same_gradients(options, at::kFloat, 2e-6);
  options = small();
  options.residual = false;
  expect_same_gradients(options, at::kFloat, 2e-6);
  options = small();
  options.random_init = true;
  expect_same_gradients(options, at::kFloat, 2e-6);
  options = small();
  options.groups = kOut;  // r = m reaches every value of the kept weights
  expect_same_gradients(options, at::kFloat, 2e-6);
}

TEST(Spp, GradientsAreFiniteDifferencesInDouble) {
  Fixture f(small(), at::kFloat);
  f.move_away();
  const Gradients g = ours(f);
  const auto loss = [&](const at::Tensor& a, const at::Tensor& b) {
    return (f.published(f.x.to(at::kDouble), a, b) * f.dy.to(at::kDouble)).sum().item<double>();
  };
  const at::Tensor alpha = f.alpha().detach().to(at::kDouble),
                   beta = f.beta().detach().to(at::kDouble);
  for (int64_t i = 0; i < alpha.numel(); i += 11) {
    at::Tensor up = alpha.clone(), down = alpha.clone();
    up.view(-1)[i] += 1e-4;
    down.view(-1)[i] -= 1e-4;
    EXPECT_NEAR(g.alpha.view(-1)[i].item<double>(), (loss(up, beta) - loss(down, beta)) / 2e-4,
                2e-4);
  }
  for (int64_t i = 0; i < beta.numel(); ++i) {
    at::Tensor up = beta.clone(), down = beta.clone();
    up[i] += 1e-4;
    down[i] -= 1e-4;
    EXPECT_NEAR(g.beta[i].item<double>(), (loss(alpha, up) - loss(alpha, down)) / 2e-4, 2e-4);
  }
}

TEST(Spp, StartsAsTheFrozenMatrixAndRandomInitDoesNot) {
  for (const bool beta : {true, false})
    for (const bool residual : {true, false}) {
      SppOptions options = small();
      options.beta = beta;
      options.residual = residual;
      const Fixture f(options, at::kFloat);
      EXPECT_TRUE(at::equal(f.adapter->merged(0), f.weight));
    }
  SppOptions random = small();
  random.random_init = true;
  EXPECT_FALSE(at::equal(Fixture(random, at::kFloat).adapter->merged(0),
                         Fixture(random, at::kFloat).weight));
  const at::Tensor alpha = Fixture(small(), at::kFloat).alpha();
  EXPECT_LE(alpha.abs().max().item<double>(), 1 / std::sqrt(kIn));
  EXPECT_GT(alpha.abs().max().item<double>(), 0.8 / std::sqrt(kIn));
}

TEST(Spp, MergedForwardIsTheAdaptersForwardToTheBit) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    Fixture f(small(), type);
    f.move_away();
    const at::Tensor merged = f.adapter->merged(0);
    EXPECT_EQ(merged.scalar_type(), type);
    const auto frozen = make_spp(small())->attach({{"w", 0, merged}}, {});
    train::ParameterSet parameters(frozen->initial_parameters(5));  // beta = 0: the matrix itself
    frozen->bind(parameters);
    Workers workers(1);
    frozen->prepare_step(workers);
    EXPECT_TRUE(at::equal(frozen->apply(0, f.x, {}, f.key), f.adapter->apply(0, f.x, {}, f.key)));
  }
}

TEST(Spp, EveryZeroStaysAndEveryNonzeroToo) {
  Fixture f(small(), at::kBFloat16);
  f.move_away();
  EXPECT_TRUE(at::equal(f.adapter->merged(0).eq(0), f.weight.eq(0)));
}

TEST(Spp, TheBiasIsAdded) {
  const Fixture f(small(), at::kFloat);
  const at::Tensor bias = at::randn({kOut});
  EXPECT_TRUE(at::allclose(f.adapter->apply(0, f.x, bias, f.key),
                           f.adapter->apply(0, f.x, {}, f.key) + bias));
}

TEST(Spp, RowGroupsThatDoNotDivideTheRowsAreRefusedNamingMatrixAndNumbers) {
  try {
    make_spp(SppOptions{})->check("model.layers.0.mlp.up_proj.weight", 24, 37);
    FAIL();
  } catch (const UserError& error) {
    const std::string text = error.what();
    for (const char* part : {"model.layers.0.mlp.up_proj.weight", "24", "16"})
      EXPECT_NE(text.find(part), std::string::npos) << text;
  }
}

TEST(Dropout, DropsTheShareAskedForAndIsTheSameWhateverTheMicroBatch) {
  const at::Tensor ones = at::ones({4 * 50, 40});
  const at::Tensor whole = dropout(ones, 0.25, {1, 9, 8, 4}, "layer");
  for (int64_t i = 0; i < 4; ++i)
    EXPECT_TRUE(at::equal(dropout(ones.narrow(0, 0, 50), 0.25, {1, 9, 8 + i, 1}, "layer"),
                          whole.narrow(0, 50 * i, 50)));
  const double dropped = whole.eq(0).to(at::kDouble).mean().item<double>();
  EXPECT_NEAR(dropped, 0.25, 4 * std::sqrt(0.25 * 0.75 / 8000));
  EXPECT_FLOAT_EQ(whole.max().item<float>(), 1 / 0.75f);
  EXPECT_FALSE(at::equal(whole, dropout(ones, 0.25, {1, 10, 8, 4}, "layer")));
  EXPECT_FALSE(at::equal(whole, dropout(ones, 0.25, {1, 9, 8, 4}, "other")));
}

TEST(Spp, GradientsAreThoseOfTheMergedWeightReduced) {
  Fixture f(small(), at::kFloat);
  f.move_away();
  const Gradients a = ours(f);
  // G: the gradient of the merged weight, by autograd in float64.
  const at::Tensor merged = f.adapter->merged(0).to(at::kDouble).set_requires_grad(true);
  const at::Tensor y = at::matmul(f.x.to(at::kDouble), merged.t());
  const at::Tensor g = torch::autograd::grad({y}, {merged}, {f.dy.to(at::kDouble)})[0];
  const at::Tensor w = f.weight.to(at::kDouble), beta = f.beta().detach().to(at::kDouble);
  const at::Tensor alpha =
      at::repeat_interleave(f.alpha().detach().to(at::kDouble), kOut / f.options.groups, 0);
  const double s = f.options.scale;
  const at::Tensor rows = s * beta.unsqueeze(1) * w * g;
  EXPECT_LT(distance(a.alpha, rows.view({f.options.groups, -1, kIn}).sum(1)), 2e-6);
  EXPECT_LT(distance(a.beta, s * (alpha * w * g).sum(1)), 2e-6);
}

}  // namespace
}  // namespace espalier::retrain
