#include "pipeline/driver/stage.h"

#include <gtest/gtest.h>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"
#include "tests/unit/compress/models.h"
#include "tests/unit/io/temporary_directory.h"

namespace espalier::compress {
namespace {

using io::expect_contains;
using io::message_of;

/// The stage made from a configuration file of one node, as the driver makes it.
class CompressKeys : public testing::Test {
 protected:
  std::unique_ptr<driver::Stage> make(const std::string& keys) {
    io::write_file(directory_ / "default.yaml", "compress:\n  method: " + method_ + "\n" + keys);
    const auto composition = config::compose({directory_.path(), "default", {}});
    return driver::make_stage("compress", composition.root().child("compress"));
  }
  std::string error(const std::string& keys) {
    return message_of<UserError>([&] { make(keys); });
  }
  io::TemporaryDirectory directory_;
  std::string method_ = "ere";
};

TEST_F(CompressKeys, AllPinnedKeysAreRead) {
  EXPECT_NE(make("  rank: null\n  budget: 0.05\n  bits: 4\n  allocation: greedy\n  prior: 0.5\n"
                 "  polar: true\n  base: null\n  finetuned: previous\n  vectors: float16\n"),
            nullptr);
  EXPECT_NE(make("  rank: 16\n  allocation: null\n  vectors: null\n"), nullptr);
}

TEST_F(CompressKeys, ExactlyOneOfRankAndBudgetMustBeSet) {
  expect_contains(error("  rank: 8\n  budget: 0.1\n"), {"compress.budget", "default.yaml:4"});
  expect_contains(error("  bits: 4\n"), {"compress.rank", "compress.budget"});
}

TEST_F(CompressKeys, ValuesOutOfRangeAndUnknownKeysAreRefused) {
  expect_contains(error("  rank: 8\n  bits: 9\n"), {"compress.bits", "9"});
  expect_contains(error("  budget: 0.0\n"), {"compress.budget"});
  expect_contains(error("  rank: 8\n  allocation: greddy\n"), {"compress.allocation", "greedy"});
  expect_contains(error("  rank: 8\n  vector: float16\n"), {"compress.vector", "vectors"});
}

TEST_F(CompressKeys, KeysThatAMethodHasNoUseForAreRefused) {
  expect_contains(error("  rank: 8\n  residuals: [a.h5]\n"), {"compress.residuals", "sum"});
  method_ = "low_rank";
  EXPECT_NE(make("  rank: 8\n"), nullptr);
  expect_contains(error("  rank: 8\n  bits: 4\n"), {"compress.bits", "float16"});
  method_ = "quantization";
  EXPECT_NE(make("  bits: 3\n"), nullptr);
  expect_contains(error("  rank: 8\n"), {"compress.rank", "truncates nothing"});
  method_ = "sum";
  EXPECT_NE(make("  residuals: [a.h5, b.h5]\n  weights: [1, 0.5]\n"), nullptr);
  expect_contains(error("  residuals: [a.h5]\n  weights: [1, 2]\n"),
                  {"compress.weights", "2", "1"});
  expect_contains(error("  bits: 4\n"), {"compress.bits"});
  method_ = "svd";
  expect_contains(error("  rank: 8\n"), {"compress.method", "low_rank", "quantization"});
}

TEST_F(CompressKeys, AModelOfOtherShapesIsRefusedBeforeAnythingRuns) {
  write_model(directory_ / "base", base_tensors());
  auto tensors = fine_tuned_tensors();
  tensors[0].second = at::zeros({3, 3});
  write_model(directory_ / "tuned", tensors);
  const std::string keys = "  rank: 8\n  base: " + (directory_ / "base").string() + "\n";
  const auto stage = make(keys + "  from: start\n");
  const driver::RunContext run{comm::Communicator::self(), nullptr, {}, 0, at::kFloat, {}, {}};
  expect_contains(message_of<UserError>([&] { stage->check(run, directory_ / "tuned"); }),
                  {"layers.0.weight"});
  EXPECT_NO_THROW(make(keys)->check(run, directory_ / "tuned"));  // stages before it may change it
  const auto lost = make("  rank: 8\n  finetuned: /nowhere/model\n");
  expect_contains(message_of<UserError>([&] { lost->check(run, directory_ / "base"); }),
                  {"compress.finetuned", "/nowhere/model"});
}

}  // namespace
}  // namespace espalier::compress
