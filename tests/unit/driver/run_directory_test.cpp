#include "pipeline/driver/run_directory.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "pipeline/io/atomic_file.h"
#include "tests/unit/io/temporary_directory.h"

namespace espalier::driver {
namespace {

using namespace std::chrono_literals;

TEST(RunDirectories, ARunOfAnotherConfigurationThatBeganDuringTheWaitForTheLockIsRefused) {
  const io::TemporaryDirectory files;
  io::write_file(files / "default.yaml", "seed: 1\n");
  const config::Composition composition = config::compose({files.path(), "default", {}});
  Shared shared;
  shared.run_directory = files / "run";
  const pid_t other = fork();
  if (other == 0) {
    new RunLock(shared.run_directory);
    std::this_thread::sleep_for(200ms);
    io::write_file(shared.run_directory / "environment.json", R"({"configuration": {"seed": 2}})");
    _exit(0);  // as if killed: the lock stays
  }
  const std::filesystem::path lock_file = shared.run_directory / "run.lock";
  while (!std::filesystem::exists(lock_file)) std::this_thread::sleep_for(1ms);
  const std::string said = io::message_of<UserError>([&] {
    const auto lock = open_run_directory(composition, shared, comm::Communicator::self());
  });
  io::expect_contains(said, {"seed=2 and now asks for 1"});
  EXPECT_FALSE(std::filesystem::exists(lock_file));
  int status = 0;
  EXPECT_EQ(waitpid(other, &status, 0), other);
}

}  // namespace
}  // namespace espalier::driver
