#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

constexpr int64_t kBlocks = 2;

/// blkdiag of I + sum_k coefficient_k u_k u_k^T / |u_k|^2, written out.
Plain block_diagonal(const std::vector<const Plain*>& vectors,
                     const std::vector<double>& coefficients) {
  const Plain& first = *vectors[0];
  const int64_t side = first.columns;
  Plain h(first.rows * side, first.rows * side);
  for (int64_t i = 0; i < h.rows; ++i) h.at(i, i) = 1;
  for (size_t k = 0; k < vectors.size(); ++k)
    for (int64_t block = 0; block < first.rows; ++block) {
      double square = 0;
      for (int64_t i = 0; i < side; ++i) square += std::pow(vectors[k]->at(block, i), 2);
      for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < side; ++j)
          h.at(block * side + i, block * side + j) +=
              coefficients[k] * vectors[k]->at(block, i) * vectors[k]->at(block, j) / square;
    }
  return h;
}

MethodCase turned(const std::string& method, const std::string& side,
                  const std::vector<double>& coefficients) {
  MethodCase c;
  c.overrides = {"retrain=" + method, "retrain.side=" + side,
                 "retrain.blocks=" + std::to_string(kBlocks)};
  c.dropout_of_everything = true;
  c.formula = [side, coefficients](const Plain& w, const std::vector<Plain>& p, const Frozen&) {
    size_t next = 0;
    const auto map = [&] {
      std::vector<const Plain*> vectors;
      for (size_t k = 0; k < coefficients.size(); ++k) vectors.push_back(&p[next++]);
      return block_diagonal(vectors, coefficients);
    };
    Plain out = w;
    if (side != "output") out = times(out, map());
    if (side != "input") out = times(map(), out);
    return out;
  };
  return c;
}
MethodCase ether(const std::string& side) { return turned("ether", side, {-2}); }
MethodCase ether_plus(const std::string& side) { return turned("ether_plus", side, {-1, 1}); }

TEST(Ether, OutputsGradientsAndMergeAreTheBlockDiagonalProducts) {
  for (const char* side : {"input", "output", "both"}) expect_follows_formula(ether(side));
}

TEST(EtherPlus, OutputsGradientsAndMergeAreTheBlockDiagonalProducts) {
  for (const char* side : {"input", "output", "both"}) expect_follows_formula(ether_plus(side));
}

TEST(EtherPlus, StartsAsTheFrozenMatrix) {
  for (const char* side : {"input", "output", "both"}) expect_identity_at_start(ether_plus(side));
}

TEST(Ether, TrainsOneNumberAnInputAndEtherPlusTwoForEachOfBothSides) {
  expect_parameters(ether("input"), 8);
  expect_parameters(ether("output"), 12);
  expect_parameters(ether("both"), 20);
  expect_parameters(ether_plus("both"), 2 * (12 + 8));
  expect_parameters(ether_plus("input"), 2 * 8);
}

/// |H - I| of each diagonal block of the input side, found by turning the identity.
std::vector<double> departures(MethodCase c, bool moved) {
  c.rows = c.columns;
  MethodAtWork at_work(c, {});
  at_work.target.weight = at::eye(c.columns);
  at_work.adapter = at_work.method->attach({at_work.target}, {});
  at_work.adapter->bind(*at_work.parameters);
  at_work.move_away(moved ? 0.5 : 0);
  const at::Tensor change = at_work.adapter->merged(0) - at_work.target.weight;
  std::vector<double> norms;
  const int64_t side = c.columns / kBlocks;
  for (int64_t b = 0; b < kBlocks; ++b)
    norms.push_back(
        change.narrow(0, b * side, side).narrow(1, b * side, side).norm().item<double>());
  EXPECT_NEAR(change.square().sum().item<double>(), norms[0] * norms[0] + norms[1] * norms[1],
              1e-5);
  const std::vector<double> told = at_work.adapter->map_distances(0);  // of the whole map
  EXPECT_EQ(told.size(), 1u);
  EXPECT_NEAR(told.at(0), std::hypot(norms[0], norms[1]), 1e-5);
  return norms;
}

TEST(Ether, EveryBlockIsAtDistanceTwoFromTheIdentity) {
  for (const bool moved : {false, true})
    for (const double norm : departures(ether("input"), moved)) EXPECT_NEAR(norm, 2, 1e-5);
}

TEST(EtherPlus, NoBlockIsFurtherThanRootTwoFromTheIdentity) {
  for (const double norm : departures(ether_plus("input"), false)) EXPECT_EQ(norm, 0);
  for (const double norm : departures(ether_plus("input"), true)) {
    EXPECT_GT(norm, 0.1);
    EXPECT_LE(norm, std::sqrt(2.0) + 1e-6);
  }
}

TEST(Ether, TheVectorsStartAsLongAsTheKeysSay) {
  const auto start = [](std::vector<std::string> more, model::Role role) {
    MethodCase c = ether("input");
    c.columns = 2000;
    c.role = role;
    c.overrides.insert(c.overrides.end(), more.begin(), more.end());
    return MethodAtWork(c, {}).parameters->parameters()[0].value.detach().clone();
  };
  const model::Role query = model::kQuery, value = model::kValue, up = model::kUp;
  const auto largest = [](const at::Tensor& t) { return t.abs().max().item<double>(); };
  EXPECT_NEAR(largest(start({}, query)), std::sqrt(1.0 / 2000), 1e-3 * std::sqrt(1.0 / 2000) * 5);
  EXPECT_NEAR(largest(start({}, value)), std::sqrt(1.0 / 2000), 1e-3 * std::sqrt(1.0 / 2000) * 5);
  EXPECT_NEAR(largest(start({}, up)), std::sqrt(2.0 / 2000), 1e-3 * std::sqrt(2.0 / 2000) * 5);
  EXPECT_NEAR(largest(start({"retrain.init=kaiming"}, query)), std::sqrt(2.0 / 2000), 1e-3);
  const at::Tensor norms = start({"retrain.start_norm=0.25"}, query).norm(2, {1});
  EXPECT_TRUE(at::allclose(norms, at::full({kBlocks}, 0.25f)));
}

TEST(Ether, BadShapesAndKeysAreRefused) {
  expect_shape_refused({"retrain=ether", "retrain.blocks=5"}, 10, 8, {"retrain.blocks = 5", "8"});
  expect_shape_refused({"retrain=ether_plus", "retrain.blocks=4"}, 10, 8, {"10 outputs"});
  expect_refused({"retrain=ether", "retrain.side=left"}, {"retrain.side", "output"});
  EXPECT_FALSE(configured({"retrain=ether"})->additive());  // merge: beside is refused for that
  expect_refused({"retrain=ether", "retrain.init=zero"}, {"retrain.init", "kaiming"});
  expect_refused({"retrain=ether", "retrain.start_norm=0"}, {"retrain.start_norm"});
}

}  // namespace
}  // namespace espalier::retrain
