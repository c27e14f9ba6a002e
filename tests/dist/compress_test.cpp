#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <memory>

#include "pipeline/comm/communicator.h"
#include "stages/compress/compressor.h"
#include "tests/unit/compress/models.h"
#include "tests/unit/io/temporary_directory.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using comm::Communicator;

/// A directory that all ranks share, removed by rank 0.
class SharedDirectory {
 public:
  explicit SharedDirectory(const Communicator& world) : world_(world) {
    if (world.is_root()) own_ = std::make_unique<io::TemporaryDirectory>();
    path_ = world.broadcast(own_ ? own_->path().string() : "");
  }
  ~SharedDirectory() { world_.barrier(); }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  Communicator world_;
  std::unique_ptr<io::TemporaryDirectory> own_;
  fs::path path_;
};

TEST(CompressOnRanks, FilesAndDecodedWeightsAreTheBytesOfOneRank) {
  const Communicator world = Communicator::world(120);
  const SharedDirectory directory(world);
  if (world.is_root()) {
    write_model(directory / "base", base_tensors());
    write_model(directory / "tuned", fine_tuned_tensors());
  }
  world.barrier();
  const auto base = io::Checkpoint::open(directory / "base");
  const auto tuned = io::Checkpoint::open(directory / "tuned");
  for (const std::string allocation : {"uniform", "paper", "greedy"}) {
    Settings settings;
    settings.rank = 10;
    settings.allocation = allocation;
    Workers team(2);
    const auto together =
        compress_model(base, tuned, directory / ("all-" + allocation), settings, world, team);
    EXPECT_GT(together["bytes"].get<int64_t>(), 0);
    if (world.is_root()) {
      Workers alone(1);
      const fs::path one = directory / ("one-" + allocation);
      compress_model(base, tuned, one, settings, Communicator::self(), alone);
      for (const std::string file : {"residual.h5", "model/changed-00001.safetensors"})
        EXPECT_EQ(io::read_file(one / file),
                  io::read_file(directory / ("all-" + allocation) / file))
            << allocation << " " << file;
    }
    world.barrier();
  }
}

}  // namespace
}  // namespace espalier::compress
