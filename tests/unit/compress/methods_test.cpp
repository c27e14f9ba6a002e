#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "pipeline/errors.h"
#include "stages/compress/compressor.h"
#include "stages/compress/decode.h"
#include "stages/compress/sum.h"
#include "tests/unit/compress/models.h"
#include "tests/unit/io/temporary_directory.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using io::expect_contains;
using io::message_of;

/// Any pair of models, compressed with the settings and decoded from the file.
class Methods : public testing::Test {
 protected:
  void SetUp() override {
    settings_.dtype = settings_.vectors = at::kFloat;
    settings_.rank = 12;
    write_model(directory_ / "base", base_tensors());
    write_model(directory_ / "tuned", fine_tuned_tensors());
  }
  io::Checkpoint open(const std::string& name) { return io::Checkpoint::open(directory_ / name); }
  fs::path residual(const std::string& name) { return directory_ / name / "residual.h5"; }

  nlohmann::json compress(const std::string& name, const std::string& tuned = "tuned") {
    Workers team(1);
    return compress_model(open("base"), open(tuned), directory_ / name, settings_,
                          comm::Communicator::self(), team);
  }
  /// The model decoded from the file; what the stage leaves must be the same.
  io::Checkpoint decoded(const std::string& name) {
    decode_residuals(directory_ / "base", {residual(name)}, directory_ / (name + "-decoded"));
    const auto decoded = open(name + "-decoded"), left = open(name + "/model");
    EXPECT_EQ(decoded.names(), left.names());
    for (const auto& tensor : decoded.names())
      EXPECT_TRUE(
          at::equal(decoded.view(tensor), left.view(tensor).to(decoded.view(tensor).scalar_type())))
          << tensor;
    return decoded;
  }
  Tensor of(const io::Checkpoint& model, const std::string& name) {
    return model.view(name).to(at::kDouble);
  }
  double relative_error(const io::Checkpoint& model, const std::string& name,
                        const std::string& tuned = "tuned") {
    const Tensor exact = of(open(tuned), name);
    return ((of(model, name) - exact).norm() / (exact - of(open("base"), name)).norm())
        .item<double>();
  }

  io::TemporaryDirectory directory_;
  Settings settings_;
};

TEST_F(Methods, LowRankHasTheErrorOfTheTruncatedSvd) {
  settings_.method = "low_rank";
  settings_.bits = kHalfBits;
  settings_.polar = false;
  settings_.allocation = "uniform";
  compress("out");
  const auto model = decoded("out");
  const Tensor delta = of(open("tuned"), "layers.0.weight") - of(open("base"), "layers.0.weight");
  const Tensor sigma = at::linalg_svdvals(delta).square();
  const double best = std::sqrt((sigma.narrow(0, 12, 84).sum() / sigma.sum()).item<double>());
  EXPECT_NEAR(relative_error(model, "layers.0.weight"), best, 2e-3 * best + 1e-4);
  EXPECT_EQ(read_residual(residual("out")).method, "low_rank");
}

TEST_F(Methods, QuantizationRoundsEveryEntryInsideTheMaskAndHalvesItsErrorWithEachBit) {
  settings_.method = "quantization";
  settings_.polar = false;
  settings_.rank.reset();
  double previous = 1;
  for (const int64_t bits : {2, 4, 8}) {
    settings_.bits = bits;
    const std::string name = "out" + std::to_string(bits);
    const auto metrics = compress(name);
    const auto model = decoded(name);
    const double error = relative_error(model, "layers.0.weight");
    EXPECT_LT(error, 0.45 * previous) << bits;
    previous = error;
    EXPECT_TRUE(
        at::equal(of(model, "layers.1.weight") == 0, of(open("base"), "layers.1.weight") == 0));
    // Half of the entries of layers.1 are pruned: they take no bits.
    for (const auto& matrix : read_residual(residual(name)).matrices) {
      const Tensor base = of(open("base"), matrix.name);
      const int64_t stored =
          matrix.encoded.mask_preserving ? (base != 0).sum().item<int64_t>() : base.numel();
      EXPECT_EQ(matrix.encoded.u.codes.numel(), (stored * bits + 7) / 8);
    }
  }
  EXPECT_LT(previous, 0.01);
}

TEST_F(Methods, QuantizedEntriesAreThoseOfAPlainLoop) {
  settings_.method = "quantization";
  settings_.rank.reset();
  settings_.bits = 3;
  compress("out");
  const auto file = read_residual(residual("out"));
  const auto model = decoded("out");
  for (const auto& matrix : file.matrices) {
    const EncodedMatrix& encoded = matrix.encoded;
    const Tensor base = of(open("base"), matrix.name).reshape({encoded.u.count, -1});
    const Tensor ours = of(model, matrix.name).reshape(base.sizes());
    const uint8_t* bytes = encoded.u.codes.const_data_ptr<uint8_t>();
    int64_t bit = 0;
    for (int64_t i = 0; i < base.size(0); ++i)
      for (int64_t j = 0; j < base.size(1); ++j) {
        const double from = base[i][j].item<double>();
        if (encoded.mask_preserving && from == 0) continue;
        int code = 0;
        for (int b = 0; b < 3; ++b, ++bit) code |= (bytes[bit / 8] >> (bit % 8) & 1) << b;
        const double step = encoded.u.scales[i].item<float>() / std::sqrt(double(base.size(1)));
        const double expected = from + (code - 3.5) * step * std::ldexp(1.0, int(encoded.exponent));
        ASSERT_NEAR(ours[i][j].item<double>(), expected, 1e-6 * (1 + std::abs(expected)));
      }
  }
}

TEST_F(Methods, AMergedLowRankAdapterIsKeptAtItsRank) {
  auto tensors = base_tensors();
  for (auto& [name, tensor] : tensors)
    if (name == "layers.0.weight" || name == "layers.2.weight")
      tensor = (tensor.to(at::kDouble) +
                at::mm(random_matrix(tensor.size(0), 4, 61), random_matrix(4, tensor.size(1), 62)))
                   .to(at::kFloat);
  write_model(directory_ / "merged", tensors);
  settings_.rank = 4;
  settings_.bits = 8;
  settings_.allocation = "uniform";
  EXPECT_EQ(compress("out", "merged")["matrices"].size(), 2u);
  const auto model = decoded("out");
  for (const std::string name : {"layers.0.weight", "layers.2.weight"})
    EXPECT_LT(relative_error(model, name, "merged"), 0.02) << name;
}

TEST_F(Methods, RowsAddedToAnEmbeddingAreKeptWholeAndTheCommonOnesAsResidual) {
  auto base = base_tensors(), tuned = fine_tuned_tensors();
  base.emplace_back("embed.weight", random_matrix(100, 32, 70).to(at::kFloat));
  base.emplace_back("still.weight", random_matrix(20, 16, 71).to(at::kFloat));
  const Tensor rows = random_matrix(5, 32, 72).to(at::kFloat);
  tuned.emplace_back("embed.weight",
                     at::cat({base[9].second + decaying_matrix(100, 32, 73).to(at::kFloat), rows}));
  tuned.emplace_back("still.weight", at::cat({base[10].second, rows.narrow(1, 0, 16)}));
  write_model(directory_ / "base", base);
  write_model(directory_ / "tuned", tuned);
  const auto metrics = compress("out");
  EXPECT_EQ(metrics["added_rows"], 10);
  const auto model = decoded("out");
  const Tensor embedding = model.view("embed.weight");
  EXPECT_TRUE(at::equal(embedding.narrow(0, 100, 5), rows));
  const Tensor exact = of(open("tuned"), "embed.weight").narrow(0, 0, 100);
  const Tensor before = of(open("base"), "embed.weight");
  EXPECT_LT((embedding.narrow(0, 0, 100).to(at::kDouble) - exact).norm().item<double>(),
            0.5 * (before - exact).norm().item<double>());
  EXPECT_TRUE(at::equal(model.view("still.weight"), open("tuned").view("still.weight")));
}

TEST_F(Methods, TiedTensorsAreStoredOnce) {
  auto base = base_tensors(), tuned = fine_tuned_tensors();
  const Tensor before = random_matrix(300, 64, 80).to(at::kFloat);
  const Tensor after = before + decaying_matrix(300, 64, 81).to(at::kFloat);
  base.emplace_back("embed.weight", before);
  tuned.emplace_back("embed.weight", after);
  write_model(directory_ / "base", base);
  write_model(directory_ / "tuned", tuned);
  const int64_t once = compress("once")["bytes"].get<int64_t>();
  for (const bool in_base : {false, true}) {  // a base may store the tensor once or twice
    auto tied = tuned;
    tied.emplace_back("lm_head.weight", after);
    write_model(directory_ / "tied", tied);
    if (in_base) base.emplace_back("lm_head.weight", before);
    write_model(directory_ / "base", base);
    const std::string name = in_base ? "twice" : "added";
    const auto metrics = compress(name, "tied");
    EXPECT_EQ(metrics["tied_tensors"], 1);
    EXPECT_LT(metrics["bytes"].get<int64_t>(), once + 4096);
    const auto model = decoded(name);
    EXPECT_TRUE(at::equal(model.view("embed.weight"), model.view("lm_head.weight")));
  }
}

TEST_F(Methods, SeveralResidualsOfOneBaseAddTheirDifferences) {
  auto other = base_tensors();
  for (auto& [name, tensor] : other)
    if (name == "layers.0.weight" || name == "layers.1.weight")
      tensor = (tensor.to(at::kDouble) + (tensor != 0).to(at::kDouble) * 0.1 *
                                             decaying_matrix(tensor.size(0), tensor.size(1), 90))
                   .to(tensor.scalar_type());
  write_model(directory_ / "other", other);
  compress("a");
  compress("b", "other");
  write_sum(open("base"), {{residual("a"), residual("b")}, {0.5, -2.0}}, directory_ / "sum");
  const auto sum = open("sum"), a = decoded("a"), b = decoded("b"), base = open("base");
  for (const auto& name : sum.names()) {
    if (name == "head.weight" || !at::isFloatingType(sum.info(name).dtype)) continue;
    const Tensor theta = of(base, name);
    const Tensor expected = theta + 0.5 * (of(a, name) - theta) - 2.0 * (of(b, name) - theta);
    EXPECT_LE((of(sum, name) - expected).abs().max().item<double>(), 1e-5) << name;
  }
  EXPECT_TRUE(at::equal(sum.view("head.weight"), a.view("head.weight")));
  EXPECT_TRUE(at::equal(of(sum, "layers.1.weight") == 0, of(base, "layers.1.weight") == 0));
  decode_residuals(directory_ / "base", {residual("a"), residual("b")}, directory_ / "dense");
  EXPECT_EQ(open("dense").names(), sum.names());
}

TEST_F(Methods, ResidualsThatContradictEachOtherOrHaveAnotherBaseAreNotAdded) {
  auto tensors = fine_tuned_tensors();
  tensors.back().second = tensors.back().second * 2;  // another head
  write_model(directory_ / "other", tensors);
  compress("a");
  compress("b", "other");
  const auto add = [&](const std::string& base) {
    return message_of<UserError>([&] {
      write_sum(open(base), {{residual("a"), residual("b")}, {}}, directory_ / "sum");
    });
  };
  expect_contains(add("base"), {"head.weight", "a/residual.h5", "b/residual.h5"});
  expect_contains(add("tuned"), {"checksum"});
}

}  // namespace
}  // namespace espalier::compress
