#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>
#include <limits>

#include "pipeline/errors.h"
#include "pipeline/model/heads.h"
#include "stages/compress/compressor.h"
#include "stages/compress/decode.h"
#include "stages/compress/pairs.h"
#include "tests/unit/compress/models.h"
#include "tests/unit/io/temporary_directory.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using io::expect_contains;
using io::message_of;

/// A base, its fine-tuned model and what compressing them gave.
class Residuals : public testing::Test {
 protected:
  void SetUp() override {
    write_model(directory_ / "base", base_tensors());
    write_model(directory_ / "tuned", fine_tuned_tensors());
    settings_.dtype = at::kFloat;
    settings_.vectors = at::kFloat;
    settings_.rank = 12;
  }
  io::Checkpoint base() const { return io::Checkpoint::open(directory_ / "base"); }
  io::Checkpoint tuned() const { return io::Checkpoint::open(directory_ / "tuned"); }
  nlohmann::json compress(const std::string& name, int workers = 1, const Hooks& hooks = {}) {
    Workers team(workers);
    return compress_model(base(), tuned(), directory_ / name, settings_, comm::Communicator::self(),
                          team, hooks);
  }
  io::Checkpoint decode(const std::string& name) {
    decode_residuals(directory_ / "base", {directory_ / name / "residual.h5"},
                     directory_ / (name + "-decoded"));
    return io::Checkpoint::open(directory_ / (name + "-decoded"));
  }
  std::string bytes_of(const std::string& name) {
    return io::read_file(directory_ / name / "residual.h5");
  }

  io::TemporaryDirectory directory_;
  Settings settings_;
};

TEST_F(Residuals, DecodeToTheModelThatTheStageLeaves) {
  compress("out");
  const auto decoded = decode("out");
  const auto left = io::Checkpoint::open(directory_ / "out/model");
  EXPECT_EQ(decoded.names(), tuned().names());
  EXPECT_EQ(left.names(), tuned().names());
  for (const auto& name : decoded.names())
    EXPECT_TRUE(at::equal(decoded.view(name), left.view(name).to(decoded.view(name).scalar_type())))
        << name;
}

TEST_F(Residuals, WithEveryRankAndEightBitsAreCloseToTheFineTunedModel) {
  settings_.rank = 96;
  settings_.bits = 8;
  settings_.allocation = "uniform";
  compress("out");
  const auto decoded = decode("out");
  for (const auto& name : tuned().names()) {
    if (!at::isFloatingType(tuned().info(name).dtype)) continue;
    const at::Tensor exact = tuned().view(name).to(at::kDouble);
    const double change =
        base().has(name) ? (exact - base().view(name).to(at::kDouble)).norm().item<double>() : 0;
    EXPECT_LE((decoded.view(name).to(at::kDouble) - exact).norm().item<double>(), 0.02 * change)
        << name;
  }
}

TEST_F(Residuals, VectorsAndNewTensorsAreKeptExactlyAndUnchangedOnesCostNothing) {
  compress("out");
  const auto decoded = decode("out");
  for (const std::string name :
       {"norm.weight", "head.weight", "bias", "positions", "layers.3.weight"})
    EXPECT_TRUE(at::equal(decoded.view(name).to(at::kDouble), tuned().view(name).to(at::kDouble)))
        << name;
  const Residual residual = read_residual(directory_ / "out/residual.h5");
  EXPECT_EQ(residual.whole.size(), 2u);  // norm.weight and head.weight
  for (const auto& matrix : residual.matrices) EXPECT_NE(matrix.name, "layers.3.weight");
}

TEST_F(Residuals, KeepEveryZeroOfAPrunedMatrix) {
  const auto metrics = compress("out");
  EXPECT_EQ(metrics["mask_preserving"], 1);
  const at::Tensor pruned = base().view("layers.1.weight") == 0;
  EXPECT_TRUE(at::equal(decode("out").view("layers.1.weight") == 0, pruned));
}

TEST_F(Residuals, OfTwoEqualModelsHoldNothing) {
  Workers team(1);
  const auto metrics = compress_model(base(), base(), directory_ / "out", settings_,
                                      comm::Communicator::self(), team);
  EXPECT_EQ(metrics["matrices"].size(), 0u);
  EXPECT_LT(metrics["bytes"].get<int64_t>(), 8192);
  const auto decoded = decode("out");
  for (const auto& name : base().names())
    EXPECT_TRUE(at::equal(decoded.view(name).to(at::kDouble), base().view(name).to(at::kDouble)));
}

TEST_F(Residuals, StayAtOrBelowTheBudgetWithEveryAllocationAndUseIt) {
  settings_.rank.reset();
  settings_.budget = 0.3;
  for (const std::string allocation : {"uniform", "paper", "greedy"})
    for (int64_t bits : {1, 4, 8}) {
      settings_.allocation = allocation;
      settings_.bits = bits;
      const auto metrics = compress(allocation + std::to_string(bits));
      EXPECT_LE(metrics["share"].get<double>(), 0.3) << allocation << bits;
      EXPECT_GT(metrics["share"].get<double>(), bits == 8 ? 0.22 : 0.0) << allocation;
    }
}

TEST_F(Residuals, GreedyLosesLeastAndStatesItsCertificate) {
  double lost[3];
  int i = 0;
  for (const std::string allocation : {"greedy", "paper", "uniform"}) {
    settings_.allocation = allocation;
    const auto certificate = compress(allocation)["certificate"];
    lost[i++] = certificate["lost_energy"].get<double>();
    EXPECT_EQ(certificate["gap"].is_null(), allocation != "greedy");
    if (allocation == "greedy") lost[0] -= certificate["gap"].get<double>();
  }
  EXPECT_LE(lost[0], lost[1]);
  EXPECT_LE(lost[0], lost[2]);
}

TEST_F(Residuals, ABudgetBelowTheWholeTensorsIsRefusedWithTheNumbers) {
  settings_.rank.reset();
  settings_.budget = 0.001;
  expect_contains(message_of<UserError>([&] { compress("out"); }),
                  {"compress.budget", "raise the budget to at least"});
}

TEST_F(Residuals, AreTheSameBytesOnOneAndThreeWorkers) {
  compress("one");
  compress("three", 3);
  EXPECT_EQ(bytes_of("one"), bytes_of("three"));
}

TEST_F(Residuals, GoOnAfterAStopWithTheBytesOfAnUndisturbedRun) {
  settings_.allocation = "paper";
  compress("whole");
  int stops = 0, starts = 0;
  for (bool finished = false; !finished && starts < 50; ++starts) {
    Hooks hooks;
    hooks.stop_requested = [] { return true; };
    try {
      compress("halting", 1, hooks);
      finished = true;
    } catch (const Requeue&) {
      ++stops;
    }
  }
  EXPECT_GT(stops, 1);
  EXPECT_LT(starts, 50);
  EXPECT_EQ(bytes_of("whole"), bytes_of("halting"));
}

TEST_F(Residuals, OfAModelThatLostHeadsDecodeToOneThatSaysWhich) {
  const std::string heads = R"({"heads": [[0, 2], [1]]})";
  io::write_file(directory_ / "base" / model::kHeadsFile, heads);
  compress("out");
  decode("out");
  EXPECT_EQ(io::read_file(directory_ / "out-decoded" / model::kHeadsFile), heads);
}

TEST_F(Residuals, AnotherBaseIsRefusedWithBothChecksums) {
  compress("out");
  auto other = base_tensors();
  other[0].second[0][0] += 1;
  write_model(directory_ / "other", other);
  const std::string message = message_of<UserError>([&] {
    decode_residuals(directory_ / "other", {directory_ / "out/residual.h5"},
                     directory_ / "decoded");
  });
  expect_contains(message, {base().tensors_checksum(),
                            io::Checkpoint::open(directory_ / "other").tensors_checksum()});
  EXPECT_FALSE(fs::exists(directory_ / "decoded"));
}

TEST_F(Residuals, ADamagedFileIsRefused) {
  compress("out");
  const fs::path file = directory_ / "out/residual.h5";
  const std::string good = io::read_file(file);
  // A byte of the codes (found by content), the first bytes, and the end cut off.
  const Residual residual = read_residual(file);
  const at::Tensor codes = residual.matrices[2].encoded.u.codes;
  const size_t at = good.find(std::string(reinterpret_cast<const char*>(codes.data_ptr()), 64));
  ASSERT_NE(at, std::string::npos);
  std::string flipped = good;
  flipped[at + 5] ^= 1;
  for (const std::string& bad :
       {flipped, good.substr(0, good.size() / 2), good.substr(8), std::string()}) {
    std::ofstream(directory_ / "bad.h5", std::ios::binary) << bad;
    expect_contains(message_of<UserError>([&] { read_residual(directory_ / "bad.h5"); }),
                    {"bad.h5"});
  }
}

TEST_F(Residuals, ModelsOfDifferentShapesOrFewerTensorsAreRefused) {
  auto tensors = fine_tuned_tensors();
  tensors[0].second = at::zeros({128, 97}, at::kBFloat16);
  write_model(directory_ / "wider", tensors);
  expect_contains(message_of<UserError>([&] {
                    require_comparable(base(), io::Checkpoint::open(directory_ / "wider"));
                  }),
                  {"layers.0.weight", "[128, 97]", "[128, 96]"});
  tensors = fine_tuned_tensors();
  tensors.erase(tensors.begin());
  write_model(directory_ / "fewer", tensors);
  expect_contains(message_of<UserError>([&] {
                    require_comparable(base(), io::Checkpoint::open(directory_ / "fewer"));
                  }),
                  {"layers.0.weight", "missing"});
}

TEST_F(Residuals, NanInTheFineTunedModelNamesTheTensor) {
  auto tensors = fine_tuned_tensors();
  tensors[2].second[3][4] = std::numeric_limits<float>::quiet_NaN();
  write_model(directory_ / "tuned", tensors);
  expect_contains(message_of<NumericalError>([&] { compress("out"); }), {"layers.2.weight", "NaN"});
}

TEST_F(Residuals, Float16VectorsThatWouldOverflowStayFloat32) {
  auto tensors = fine_tuned_tensors();
  tensors[6].second = at::full({96}, 1e6, at::kFloat);
  tensors[7].second = tensors[7].second * 2;
  write_model(directory_ / "tuned", tensors);
  const auto whole = whole_tensors(base(), tuned(), {}, at::kHalf);
  ASSERT_EQ(whole.size(), 3u);  // bias, head.weight, norm.weight
  EXPECT_EQ(whole[0].tensor.scalar_type(), at::kHalf);
  EXPECT_EQ(whole[2].tensor.scalar_type(), at::kFloat);
}

}  // namespace
}  // namespace espalier::compress
