#include "pipeline/comm/launcher.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "pipeline/comm/communicator.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

/// The variables of every launcher, cleared, then those given; as before at the end.
class Environment {
 public:
  using Variables = std::map<std::string, std::string>;
  explicit Environment(const Variables& set) {
    for (const char* name :
         {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "PMI_RANK", "PMI_SIZE", "PMI_FD",
          "MPI_LOCALRANKID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"}) {
      if (const char* value = std::getenv(name)) before_[name] = value;
      names_.push_back(name);
      ::unsetenv(name);
    }
    for (const auto& [name, value] : set) ::setenv(name.c_str(), value.c_str(), 1);
  }
  ~Environment() {
    for (const auto& name : names_) ::unsetenv(name.c_str());
    for (const auto& [name, value] : before_) ::setenv(name.c_str(), value.c_str(), 1);
  }

 private:
  std::vector<std::string> names_;
  Variables before_;
};

TEST(Launcher, AProgramStartedAloneIsItsOwnGroup) {
  const Environment environment({});
  EXPECT_FALSE(find_launcher().present);
  const auto world = Communicator::world(10);
  EXPECT_EQ(world.backend(), "self");
  EXPECT_EQ(world.size(), 1);
}

TEST(Launcher, SettingsOfAnMpiLibraryAreNoLauncher) {
  const Environment environment({});
  ::setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
  ::setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 0);
  EXPECT_FALSE(find_launcher().present);
}

TEST(Launcher, ABatchScriptsShellIsNoLauncherEither) {
  const Environment environment(Environment::Variables{{"SLURM_PROCID", "0"}});
  EXPECT_EQ(Communicator::world(10).backend(), "self");
}

TEST(Launcher, SeveralTasksWithoutMpiAreRefusedBeforeTheyWriteTheSameFiles) {
  const Environment environment({{"SLURM_PROCID", "1"}, {"SLURM_STEP_NUM_TASKS", "4"}});
  try {
    Communicator::world(10);
    FAIL() << "no error";
  } catch (const EnvironmentError& error) {
    EXPECT_NE(std::string(error.what()).find("4 processes"), std::string::npos) << error.what();
  }
}

TEST(Launcher, AnotherLibrarysMpirunIsRefused) {
  const Environment environment({{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}});
  const auto launcher = find_launcher();
  EXPECT_TRUE(launcher.present);
  EXPECT_THROW(require_group_size(launcher, 1), EnvironmentError);
  EXPECT_NO_THROW(require_group_size(launcher, 2));
}

TEST(Self, CollectivesAreTheIdentity) {
  const auto self = Communicator::self();
  std::vector<int64_t> values = {3, -4};
  self.all_reduce_sum(values);
  EXPECT_EQ(values, (std::vector<int64_t>{3, -4}));
  EXPECT_EQ(self.broadcast("text"), "text");
  EXPECT_EQ(self.gather(std::vector<std::byte>(5)).at(0).size(), 5u);
  EXPECT_NO_THROW(self.require_same("configuration", "a"));
  EXPECT_THROW(self.broadcast("text", 1), DefectError);
  EXPECT_THROW(self.all_reduce_sum_device(nullptr, 0, nullptr), DefectError);
  EXPECT_EQ(self.bytes_sent(), 0);
}

TEST(Self, AbortPrintsOneLineAndExitsWithTheCode) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(Communicator::self().abort("data/a.h5: no such file", 2), testing::ExitedWithCode(2),
              "^espalier: data/a.h5: no such file\n$");
}

}  // namespace
}  // namespace espalier::comm
