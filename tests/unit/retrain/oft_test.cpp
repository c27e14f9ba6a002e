#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

constexpr int64_t kBlocks = 2;

/// The inverse by Gauss and Jordan, pivoting.
Plain inverse(Plain a) {
  Plain out(a.rows, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) out.at(i, i) = 1;
  for (int64_t column = 0; column < a.rows; ++column) {
    int64_t pivot = column;
    for (int64_t i = column; i < a.rows; ++i)
      if (std::abs(a.at(i, column)) > std::abs(a.at(pivot, column))) pivot = i;
    for (int64_t j = 0; j < a.rows; ++j) {
      std::swap(a.at(column, j), a.at(pivot, j));
      std::swap(out.at(column, j), out.at(pivot, j));
    }
    const double scale = 1 / a.at(column, column);
    for (int64_t j = 0; j < a.rows; ++j) a.at(column, j) *= scale, out.at(column, j) *= scale;
    for (int64_t i = 0; i < a.rows; ++i) {
      const double factor = i == column ? 0 : a.at(i, column);
      for (int64_t j = 0; j < a.rows; ++j) {
        a.at(i, j) -= factor * a.at(column, j);
        out.at(i, j) -= factor * out.at(column, j);
      }
    }
  }
  return out;
}

/// blkdiag of the parameter's blocks [blocks, d, d], each made by Cayley's transform when asked.
Plain block_diagonal(const Plain& parameter, bool cayley) {
  const auto side = static_cast<int64_t>(std::sqrt(parameter.columns));
  Plain h(parameter.rows * side, parameter.rows * side);
  for (int64_t b = 0; b < parameter.rows; ++b) {
    Plain block(side, side);
    for (int64_t i = 0; i < side * side; ++i) block.values[i] = parameter.at(b, i);
    if (cayley) {
      Plain more(side, side), less(side, side);
      for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < side; ++j) {
          const double s = (block.at(i, j) - block.at(j, i)) / 2, one = i == j;
          more.at(i, j) = one + s;
          less.at(i, j) = one - s;
        }
      block = times(more, inverse(less));
    }
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j) h.at(b * side + i, b * side + j) = block.at(i, j);
  }
  return h;
}

MethodCase whole(const std::string& method, const std::string& side) {
  MethodCase c;
  c.overrides = {"retrain=" + method, "retrain.side=" + side,
                 "retrain.blocks=" + std::to_string(kBlocks)};
  c.dropout_of_everything = true;
  c.formula = [method, side](const Plain& w, const std::vector<Plain>& p, const Frozen&) {
    size_t next = 0;
    Plain out = w;
    if (side != "output") out = times(out, block_diagonal(p[next++], method == "oft"));
    if (side != "input") out = times(block_diagonal(p[next++], method == "oft"), out);
    return out;
  };
  return c;
}

TEST(Oft, OutputsGradientsAndMergeAreTheBlockDiagonalProducts) {
  for (const char* side : {"input", "output", "both"}) expect_follows_formula(whole("oft", side));
}

TEST(Oft, StartsAsTheFrozenMatrixAndTurnsWithoutStretching) {
  expect_identity_at_start(whole("oft", "both"));
  MethodAtWork at_work(whole("oft", "input"), {});
  at_work.move_away();
  const at::Tensor w = at_work.target.weight, turned = at_work.adapter->merged(0);
  EXPECT_FALSE(at::allclose(turned, w, 1e-2, 1e-2));
  EXPECT_TRUE(at::allclose(at::matmul(turned, turned.t()), at::matmul(w, w.t()), 1e-4, 1e-4));
}

TEST(Oft, TellsHowFarItsBlocksAreFromTheIdentity) {
  for (const char* method : {"oft", "naive"}) {
    MethodCase c = whole(method, "both");
    c.rows = c.columns = 8;
    MethodAtWork at_work(c, {});
    EXPECT_EQ(at_work.adapter->map_distances(0), std::vector<double>({0, 0}));
    at_work.move_away();
    for (size_t side = 0; side < 2; ++side) {
      Plain h =
          block_diagonal(Plain(at_work.parameters->parameters()[side].value.reshape({kBlocks, 16})),
                         c.overrides[0] == "retrain=oft");
      double square = 0;
      for (int64_t i = 0; i < 8; ++i)
        for (int64_t j = 0; j < 8; ++j) square += std::pow(h.at(i, j) - (i == j), 2);
      EXPECT_NEAR(at_work.adapter->map_distances(0).at(side), std::sqrt(square), 1e-5);
    }
  }
}

TEST(Oft, TrainsWholeBlocksOfWhichThePaperReportsHalf) {
  expect_parameters(whole("oft", "input"), 8 * 4);
  expect_parameters(whole("oft", "both"), 8 * 4 + 12 * 6);
  EXPECT_EQ(configured(whole("oft", "input").overrides)->reported_parameters(12, 8), 16);
}

TEST(Naive, OutputsGradientsAndMergeAreTheBlockDiagonalProducts) {
  for (const char* side : {"input", "output", "both"}) expect_follows_formula(whole("naive", side));
}

TEST(Naive, StartsAsTheFrozenMatrixAndTrainsWholeBlocks) {
  expect_identity_at_start(whole("naive", "both"));
  expect_parameters(whole("naive", "input"), 8 * 4);
  EXPECT_EQ(configured(whole("naive", "input").overrides)->reported_parameters(12, 8), 32);
}

TEST(Oft, BadShapesAndKeysAreRefused) {
  for (const char* method : {"oft", "naive"}) {
    const std::string choice = std::string("retrain=") + method;
    expect_shape_refused({choice, "retrain.blocks=3"}, 12, 8, {"retrain.blocks = 3", "8 inputs"});
    expect_refused({choice, "retrain.blocks=0"}, {"retrain.blocks"});
    EXPECT_FALSE(configured({choice})->additive());  // merge: beside is refused for that
  }
}

}  // namespace
}  // namespace espalier::retrain
