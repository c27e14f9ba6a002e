#include "pipeline/driver/run_lock.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

class RunLocks : public testing::Test {
 protected:
  RunLocks()
      : directory_(fs::path(testing::TempDir()) / ("espalier_lock_" + std::to_string(getpid()))),
        file_(directory_ / "run.lock") {
    fs::remove_all(directory_);
  }
  ~RunLocks() override { fs::remove_all(directory_); }

  std::string refusal() const {
    try {
      const RunLock second(directory_, kQuick);
    } catch (const EnvironmentError& error) {
      return error.what();
    }
    return "";
  }
  nlohmann::json owner() const { return nlohmann::json::parse(io::read_file(file_)); }
  /// A lock that another start on such a host left, last seen so long ago.
  void leave(const nlohmann::json& owner, std::chrono::seconds ago) const {
    io::write_file(file_, owner.dump());
    fs::last_write_time(file_, fs::file_time_type::clock::now() - ago);
  }

  static constexpr RunLock::Timing kQuick{50ms, 60s};
  fs::path directory_, file_;
};

TEST_F(RunLocks, NamesTheOwnerAndGoesWithIt) {
  {
    const RunLock lock(directory_, kQuick);
    EXPECT_EQ(owner()["process"], getpid());
    const std::string said = refusal();
    for (const std::string& part : {directory_.string(), std::to_string(getpid()),
                                    owner()["host"].get<std::string>(), std::string("run.dir")})
      EXPECT_NE(said.find(part), std::string::npos) << said;
    EXPECT_TRUE(fs::exists(file_));
  }
  EXPECT_TRUE(fs::is_empty(directory_));
}

TEST_F(RunLocks, OfAProcessThatIsGoneIsTakenAtOnce) {
  const pid_t child = fork();
  if (child == 0) {
    new RunLock(directory_, kQuick);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(owner()["process"], child);
  const RunLock lock(directory_, kQuick);
  EXPECT_EQ(owner()["process"], getpid());
}

TEST_F(RunLocks, ThatAKilledStartPutAsideAreRemoved) {
  io::write_file(directory_ / "run.lock.stale.12", "{}");
  { const RunLock lock(directory_, kQuick); }
  EXPECT_TRUE(fs::is_empty(directory_));
}

TEST_F(RunLocks, OfAnotherProcessOfTheSameNumberIsTakenToo) {
  nlohmann::json left;
  {
    const RunLock lock(directory_, kQuick);
    left = owner();
  }
  left["started"] = "1";
  leave(left, 0s);
  EXPECT_EQ(refusal(), "");
}

TEST_F(RunLocks, OfAnotherBootIsOfAnotherHostThoughTheNameIsTheSame) {
  nlohmann::json left;
  {
    const RunLock lock(directory_, kQuick);
    left = owner();
  }
  left["boot"] = "another";
  left["process"] = 2147483646;
  leave(left, 20s);
  const std::string said = refusal();
  EXPECT_NE(said.find("from 4"), std::string::npos) << said;  // 60 s of silence less 20
  leave(left, 90s);
  EXPECT_EQ(refusal(), "");
}

TEST_F(RunLocks, TellWhoHasADirectoryWhateverTheFileHolds) {
  EXPECT_FALSE(owner_of(directory_).has_value());
  {
    const RunLock lock(directory_, kQuick);
    EXPECT_NE(owner_of(directory_)->text.find(std::to_string(getpid())), std::string::npos);
    EXPECT_FALSE(owner_of(directory_)->gone);
    EXPECT_FALSE(owner_of(directory_)->silent);
    nlohmann::json left = owner();
    left["started"] = "1";
    leave(left, 0s);
    EXPECT_TRUE(owner_of(directory_)->gone);
    fs::remove(file_);
  }
  leave({{"host", 3}, {"process", "x"}}, 5s);
  EXPECT_FALSE(owner_of(directory_)->silent);
  leave({{"host", 3}, {"process", "x"}}, 300s);
  EXPECT_TRUE(owner_of(directory_)->silent);
  io::write_file(file_, "");
  EXPECT_NE(owner_of(directory_)->text.find("another start"), std::string::npos);
}

TEST_F(RunLocks, OfTheSameSlurmJobBeforeItWasRequeuedIsTakenAtOnce) {
  setenv("SLURM_JOB_ID", "12", 1);
  leave({{"host", "elsewhere"}, {"process", 77}, {"job", "12"}, {"restart", ""}}, 0s);
  EXPECT_NE(refusal().find("process 77"), std::string::npos);
  setenv("SLURM_RESTART_COUNT", "1", 1);
  EXPECT_EQ(refusal(), "");
  unsetenv("SLURM_RESTART_COUNT");
  unsetenv("SLURM_JOB_ID");
}

TEST_F(RunLocks, OfAnotherHostIsKeptWhileItGivesSignsOfLife) {
  leave({{"host", "elsewhere"}, {"process", 77}, {"time", "noon"}, {"job", "12"}}, 35s);
  const std::string said = refusal();
  for (const char* part : {"process 77 on elsewhere (job 12) since noon", "last seen 3"})
    EXPECT_NE(said.find(part), std::string::npos) << said;
  leave({{"host", "elsewhere"}, {"process", 77}}, 90s);
  EXPECT_EQ(refusal(), "");
}

TEST_F(RunLocks, SignsOfLifeThatComeWhileItIsWatchedKeepIt) {
  leave({{"host", "elsewhere"}, {"process", 77}}, 90s);  // as after a clock's jump
  std::atomic<bool> ended = false;
  std::jthread other([&] {
    while (!ended) {
      std::this_thread::sleep_for(10ms);
      std::error_code gone;
      fs::last_write_time(file_, fs::file_time_type::clock::now() - 80s, gone);
    }
  });
  const std::string said = refusal();
  ended = true;
  EXPECT_NE(said.find("process 77"), std::string::npos) << said;
}

TEST_F(RunLocks, ADamagedOneCountsByItsAge) {
  fs::create_directories(directory_);
  std::ofstream(file_) << "\x01{";
  EXPECT_NE(refusal().find("another start"), std::string::npos);
  fs::last_write_time(file_, fs::file_time_type::clock::now() - 90s);
  EXPECT_EQ(refusal(), "");
}

TEST_F(RunLocks, TheOwnersSignsOfLifeKeepItYoung) {
  const RunLock lock(directory_, kQuick);
  fs::last_write_time(file_, fs::file_time_type::clock::now() - 90s);
  std::this_thread::sleep_for(300ms);
  EXPECT_LT(fs::file_time_type::clock::now() - fs::last_write_time(file_), 10s);
}

TEST_F(RunLocks, AnOwnerThatFindsAnothersLockEnds) {
  const auto overtaken = [&] {
    const RunLock lock(directory_, kQuick);
    io::write_file(file_, "another");
    std::this_thread::sleep_for(10s);
  };
  EXPECT_EXIT(overtaken(), testing::ExitedWithCode(kExitEnvironment), "another start has taken");
}

}  // namespace
}  // namespace espalier::driver
