#include <filesystem>

#include "pipeline/io/hdf5.h"
#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

MethodCase dsee(const std::string& index_sets = "random") {
  MethodCase c;
  c.overrides = {"retrain=dsee", "retrain.adapter_rank=4", "retrain.alpha=6",
                 "retrain.cardinality=5", "retrain.index_sets=" + index_sets};
  c.formula = [](const Plain& w, const std::vector<Plain>& p, const Frozen& frozen) {
    Plain added = times(p[1], p[0]);  // B A
    if (p.size() > 2)
      for (const auto& [name, positions] : frozen)
        for (int64_t k = 0; k < positions.numel(); ++k)
          added.values[positions[k].item<int64_t>()] += p[2].values[k];
    Plain out = w;
    for (size_t i = 0; i < out.values.size(); ++i) out.values[i] += 6.0 / 4.0 * added.values[i];
    return out;
  };
  return c;
}

TEST(Dsee, OutputsGradientsAndMergeAreTheFormulas) {
  expect_follows_formula(dsee());
  expect_follows_formula(dsee("none"));
}

TEST(Dsee, StartsAsTheFrozenMatrixWithAOfDeviationTwoHundredths) {
  expect_identity_at_start(dsee());
  MethodCase wide = dsee();
  wide.columns = 4000;
  const MethodAtWork at_work(wide, {});
  const at::Tensor a = at_work.parameters->parameters()[0].value.detach();
  EXPECT_NEAR(a.std().item<double>(), 0.02, 0.02 * 4 / std::sqrt(2.0 * 16000));
  EXPECT_NEAR(a.mean().item<double>(), 0, 4 * 0.02 / std::sqrt(16000));
}

TEST(Dsee, TrainsBothFactorsAndTheSparseEntries) {
  expect_parameters(dsee(), 4 * (12 + 8) + 5);
  expect_parameters(dsee("none"), 4 * (12 + 8));
}

TEST(Dsee, RandomPositionsAreDifferentAscendingAndOfTheSeed) {
  const MethodAtWork at_work(dsee(), {});
  const at::Tensor positions = at_work.frozen_.begin()->second;
  ASSERT_EQ(positions.numel(), 5);
  for (int64_t k = 1; k < 5; ++k)
    EXPECT_LT(positions[k - 1].item<int64_t>(), positions[k].item<int64_t>());
  EXPECT_TRUE(at::equal(MethodAtWork(dsee(), {}).frozen_.begin()->second, positions));
}

TEST(Dsee, WhatStaysBesideIsTheMergedChange) {
  MethodAtWork at_work(dsee(), {});
  at_work.move_away();
  const auto terms = at_work.adapter->beside(0);
  ASSERT_TRUE(terms);
  at::Tensor sum = at_work.target.weight + terms->scale * at::matmul(terms->up, terms->down);
  sum.view(-1).index_add_(0, terms->positions, terms->values);
  EXPECT_TRUE(at::allclose(at_work.adapter->merged(0), sum, 1e-5, 1e-6));
}

/// A file of discover's form with the positions of one matrix [rows, columns].
class IndexSetFile {
 public:
  IndexSetFile(const std::string& matrix, int64_t rows, int64_t columns,
               const std::vector<int64_t>& positions)
      : path_(std::filesystem::temp_directory_path() /
              ("espalier_dsee_" + std::to_string(getpid()) + ".h5")) {
    io::Hdf5Writer writer(path_);
    writer.write("/" + matrix, at::tensor(positions, at::kLong));
    writer.attribute("/" + matrix, "rows", rows);
    writer.attribute("/" + matrix, "columns", columns);
    writer.commit();
  }
  ~IndexSetFile() { std::filesystem::remove(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::unique_ptr<Adapter> attached(const MethodCase& c, const AttachOptions& options) {
  return configured(c.overrides)->attach({{c.name, 0, at::randn({c.rows, c.columns})}}, options);
}

TEST(Dsee, ReadsThePositionsThatDiscoverLeftOrTheAdapterStored) {
  const MethodCase c = dsee("null");
  const std::vector<int64_t> positions = {0, 7, 8, 50, 95};
  const IndexSetFile file(c.name, 12, 8, positions);
  AttachOptions options;
  options.index_sets = file.path();
  const NamedTensors frozen = attached(c, options)->frozen_tensors();
  ASSERT_EQ(frozen.size(), 1u);
  EXPECT_TRUE(at::equal(frozen[0].second, at::tensor(positions, at::kLong)));
  AttachOptions again;
  again.frozen[frozen[0].first] = frozen[0].second;
  EXPECT_TRUE(at::equal(attached(c, again)->frozen_tensors()[0].second, frozen[0].second));
}

TEST(Dsee, IndexSetsThatDoNotFitAreRefused) {
  const MethodCase c = dsee("null");
  const auto refusal = [&](const std::string& matrix, int64_t rows,
                           const std::vector<int64_t>& positions) {
    const IndexSetFile file(matrix, rows, 8, positions);
    AttachOptions options;
    options.index_sets = file.path();
    return refusal_of([&] { attached(c, options); });
  };
  EXPECT_NE(refusal("other.weight", 12, {0, 1, 2, 3, 4}).find("discover.targets"),
            std::string::npos);
  EXPECT_NE(refusal(c.name, 13, {0, 1, 2, 3, 4}).find("another shape"), std::string::npos);
  EXPECT_NE(refusal(c.name, 12, {0, 1, 2}).find("retrain.cardinality is 5"), std::string::npos);
  EXPECT_NE(refusal(c.name, 12, {0, 2, 2, 3, 4}).find("position 2 is 2"), std::string::npos);
  EXPECT_NE(refusal(c.name, 12, {0, 1, 2, 3, 96}).find("position 4 is 96"), std::string::npos);
  EXPECT_NE(refusal_of([&] { attached(c, {}); }).find("index_sets"), std::string::npos);
  expect_refused({"retrain=dsee", "retrain.cardinality=0"}, {"retrain.cardinality"});
  expect_shape_refused({"retrain=dsee", "retrain.adapter_rank=2", "retrain.cardinality=7"}, 2, 3,
                       {"retrain.cardinality = 7"});
}

}  // namespace
}  // namespace espalier::retrain
