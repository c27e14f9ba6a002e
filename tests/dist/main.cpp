// Runs every test of tests/dist on all ranks of mpirun. Rank 0 prints; another rank prints only its
// own failures. A test that fails anywhere fails everywhere, and what a test throws ends all ranks.
#include <gtest/gtest.h>

#include <cstdio>
#include <exception>

#include "pipeline/comm/communicator.h"
#include "pipeline/errors.h"

namespace {

using espalier::comm::Communicator;

constexpr double kTimeoutSeconds = 120;

/// Prints the failures of this rank with its number.
class FailuresOfOneRank : public testing::EmptyTestEventListener {
 public:
  explicit FailuresOfOneRank(int rank) : rank_(rank) {}
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::fprintf(stderr, "rank %d: %s:%d: %s\n", rank_,
                 result.file_name() ? result.file_name() : "?", result.line_number(),
                 result.message());
  }

 private:
  int rank_;
};

/// After every test, rank 0 fails too when another rank has failed.
class Agreement : public testing::EmptyTestEventListener {
 public:
  explicit Agreement(const Communicator& world) : world_(world) {}
  void OnTestEnd(const testing::TestInfo& info) override {
    int64_t failing_rank = info.result()->Failed() ? world_.rank() : -1;
    world_.all_reduce_max(std::span<int64_t>(&failing_rank, 1));
    if (failing_rank < 0) return;
    failed_ = true;
    if (world_.is_root())
      std::printf("[  FAILED  ] %s.%s on rank %d\n", info.test_suite_name(), info.name(),
                  static_cast<int>(failing_rank));
  }
  bool failed() const { return failed_; }

 private:
  Communicator world_;
  bool failed_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  // What escapes a test must end all ranks, not leave the others waiting in its collectives.
  GTEST_FLAG_SET(catch_exceptions, false);
  const Communicator world = Communicator::world(kTimeoutSeconds);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (!world.is_root()) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOfOneRank(world.rank()));
  }
  auto* agreement = new Agreement(world);
  listeners.Append(agreement);
  try {
    const int result = RUN_ALL_TESTS();
    return result != 0 || agreement->failed() ? 1 : 0;
  } catch (const espalier::Error& error) {
    world.abort(error.what(), error.exit_code());
  } catch (const std::exception& error) {
    world.abort(error.what(), espalier::kExitDefect);
  }
}
