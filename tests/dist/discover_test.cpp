#include <gtest/gtest.h>

#include <memory>

#include "pipeline/comm/communicator.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "stages/discover/grebsmo.h"
#include "stages/discover/index_sets.h"
#include "tests/unit/io/temporary_directory.h"
#include "tests/unit/retrain/tiny_llama.h"

namespace espalier::discover {
namespace {

namespace fs = std::filesystem;
using comm::Communicator;

class Grebsmo : public Method {
 public:
  void check(const std::string&, int64_t, int64_t) const override {}
  double predicted_cost(int64_t rows, int64_t columns) const override {
    return double(rows) * double(columns);
  }
  IndexSet discover(const Matrix& matrix, int64_t cardinality) const override {
    return grebsmo(matrix, cardinality, {});
  }
};

void discover_into(const fs::path& directory, const io::Checkpoint& model,
                   const Communicator& group, int threads, const driver::Hooks& hooks = {}) {
  Workers workers(threads);
  const Grebsmo method;
  const model::Architecture architecture = model::read_architecture(model);
  discover_index_sets(model, architecture, target_matrices(architecture, {"*"}),
                      {"grebsmo", method, 16, 3}, directory, group, workers, hooks);
}

TEST(DiscoverOnRanks, TheFileHasTheBytesOfOneRankAndOfARunThatWasStopped) {
  const Communicator world = Communicator::world(120);
  std::unique_ptr<io::TemporaryDirectory> own;
  if (world.is_root()) {
    own = std::make_unique<io::TemporaryDirectory>();
    retrain::write_tiny_llama(own->path() / "model");
  }
  const fs::path shared = world.broadcast(own ? own->path().string() : "");
  const auto model = io::Checkpoint::open(shared / "model");
  discover_into(shared / "together", model, world, 2);
  int stops = 0;
  for (bool finished = false; !finished && stops < 50;) {
    driver::Hooks hooks;
    hooks.stop_requested = [] { return true; };
    try {
      discover_into(shared / "halting", model, world, 1, hooks);
      finished = true;
    } catch (const Requeue&) {
      ++stops;
    }
    world.barrier();
  }
  EXPECT_GE(stops, 1);
  if (world.is_root()) {
    discover_into(shared / "alone", model, Communicator::self(), 1);
    const std::string expected = io::read_file(shared / "alone/index_sets.h5");
    EXPECT_EQ(expected, io::read_file(shared / "together/index_sets.h5"));
    EXPECT_EQ(expected, io::read_file(shared / "halting/index_sets.h5"));
  }
  world.barrier();
}

}  // namespace
}  // namespace espalier::discover
