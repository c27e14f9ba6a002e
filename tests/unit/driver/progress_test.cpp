#include "pipeline/driver/progress.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "pipeline/io/atomic_file.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

class ProgressFile : public testing::Test {
 protected:
  ProgressFile()
      : directory_(fs::path(testing::TempDir()) /
                   ("espalier_progress_" + std::to_string(getpid()))) {
    fs::remove_all(directory_);
    fs::create_directories(directory_);
  }
  ~ProgressFile() override { fs::remove_all(directory_); }

  nlohmann::json told() const {
    return nlohmann::json::parse(io::read_file(directory_ / kProgressFile));
  }

  fs::path directory_;
};

TEST_F(ProgressFile, RateAndTimeLeftAreOfWhatThisStartDid) {
  Progress progress("02-prune", directory_);
  EXPECT_EQ(told()["stage"], "02-prune");
  EXPECT_FALSE(told().contains("phase"));
  const auto begun = std::chrono::steady_clock::now();
  progress.start("blocks", 60, 30);
  EXPECT_EQ(told()["done"], 30);
  EXPECT_FALSE(told().contains("per_second"));
  std::this_thread::sleep_for(400ms);  // passes once more through what is finished
  progress.advance(30);
  std::this_thread::sleep_for(20ms);
  progress.advance(40);
  progress.finish();
  const double rate = told()["per_second"];
  EXPECT_LE(rate, 10 / 0.02);
  const std::chrono::duration<double> all = std::chrono::steady_clock::now() - begun;
  EXPECT_GT(rate, 10 / (all.count() - 0.4));
  EXPECT_DOUBLE_EQ(told()["seconds_left"].get<double>(), 20 / rate);
  EXPECT_EQ(told()["phase"], "blocks");
  EXPECT_EQ(told()["total"], 60);
}

TEST_F(ProgressFile, AnEndInTheMiddleIsToldToTheUnit) {
  {
    Progress progress("02-retrain", directory_);
    progress.start("steps", 1000);
    for (int step = 1; step <= 7; ++step) progress.advance(step, "loss 2.5");
  }
  EXPECT_EQ(told()["done"], 7);
  EXPECT_EQ(told()["detail"], "loss 2.5");
}

TEST_F(ProgressFile, ThatCannotBeWrittenEndsNoRunAndLeavesNothingBehind) {
  fs::create_directories(directory_ / kProgressFile / "in the way");
  {
    Progress progress("02-retrain", directory_);
    progress.start("steps", 10);
    progress.finish();
  }
  for (const auto& entry : fs::directory_iterator(directory_))
    EXPECT_FALSE(io::is_temporary(entry.path())) << entry.path();
}

TEST_F(ProgressFile, IsRankZerosAlone) {
  {
    Progress progress("02-retrain", "");
    progress.start("steps", 10);
    progress.advance(10);
    progress.finish();
  }
  EXPECT_FALSE(fs::exists(kProgressFile));
  EXPECT_TRUE(fs::is_empty(directory_));
}

TEST(ClockText, OfSecondsAndOfHours) {
  EXPECT_EQ(clock_text(7.4), "0:07");
  EXPECT_EQ(clock_text(3600 + 2 * 60 + 3), "1:02:03");
}

}  // namespace
}  // namespace espalier::driver
