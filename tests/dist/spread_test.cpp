// What ranks compute together for one model is what one process computes, to the byte.
#include "pipeline/driver/spread.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/safetensors.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using comm::Communicator;

/// A directory that all ranks share, with a model of tensors of unlike size in it.
class SpreadWork : public testing::Test {
 protected:
  SpreadWork() {
    std::string name;
    if (world_.is_root()) {
      name = (fs::temp_directory_path() / "espalier-spread-XXXXXX").string();
      if (::mkdtemp(name.data()) == nullptr) throw EnvironmentError(name + ": cannot be created");
      directory_ = name;
      std::vector<std::pair<std::string, at::Tensor>> tensors;
      for (int64_t i = 0; i < 7; ++i)
        tensors.emplace_back("t" + std::to_string(i),
                             at::arange(10 + 90 * (i % 3), at::kFloat).add_(double(i)));
      tensors.emplace_back(
          "sparse", at::arange(160, at::kFloat).remainder(4).eq(3).to(at::kFloat).reshape({8, 20}));
      io::write_safetensors(directory_ / "model/model.safetensors", tensors);
      io::write_file(directory_ / "model/config.json", "{\"model_type\": \"none\"}\n");
      io::write_file(directory_ / "model/tokenizer.json", "words");
    }
    directory_ = world_.broadcast(name);
  }
  ~SpreadWork() override {
    world_.barrier();
    if (world_.is_root()) fs::remove_all(directory_);
  }
  fs::path model() const { return directory_ / "model"; }

  Communicator world_ = Communicator::world(120);
  fs::path directory_;
};

void expect_equal(const std::vector<io::Output>& ours, const std::vector<io::Output>& expected) {
  EXPECT_EQ(io::json_of(ours), io::json_of(expected));
}

TEST_F(SpreadWork, EveryRankGetsEveryItemInItsPlace) {
  const std::vector<int64_t> bytes = {1, 5, 3, 9, 0, 2, 7};
  int64_t computed = 0;
  const auto texts = spread(bytes, world_, [&](int64_t i) {
    ++computed;
    return std::string(static_cast<size_t>(i), 'x');
  });
  ASSERT_EQ(texts.size(), 7u);
  for (size_t i = 0; i < 7; ++i) EXPECT_EQ(texts[i].size(), i);
  world_.all_reduce_sum(std::span<int64_t>(&computed, 1));
  EXPECT_EQ(computed, 7);
}

TEST_F(SpreadWork, OutputsHaveTheChecksumsOfOneProcess) {
  const std::vector<io::Output> ours = list_outputs(model(), world_);
  expect_equal(ours, io::list_outputs(model()));
  EXPECT_EQ(ours.size(), 3u);
  EXPECT_EQ(damaged_output(model(), ours, world_), "");
  world_.barrier();
  if (world_.is_root()) io::write_file(model() / "tokenizer.json", "wordz");
  world_.barrier();
  // Rank 0's list counts; the others need none.
  const auto known = world_.is_root() ? ours : std::vector<io::Output>();
  EXPECT_NE(damaged_output(model(), known, world_).find("tokenizer.json: has checksum"),
            std::string::npos);
}

TEST_F(SpreadWork, AModelHasTheChecksumOfOneProcess) {
  const std::string ours = tensors_checksum(io::Checkpoint::open(model()), world_);
  world_.barrier();
  // Copied, so that nothing is known of its tensors.
  if (world_.is_root()) fs::copy(model(), directory_ / "copy");
  world_.barrier();
  EXPECT_EQ(ours, io::Checkpoint::open(directory_ / "copy").tensors_checksum());
}

TEST_F(SpreadWork, AnExportOfManyShardsIsTheFilesOfOneProcess) {
  const io::Checkpoint checkpoint = io::Checkpoint::open(model());
  for (const auto format : {io::PackFormat::dense, io::PackFormat::bitmask, io::PackFormat::nm}) {
    const auto target = [&](const std::string& name) {
      return directory_ / (name + std::to_string(static_cast<int>(format)));
    };
    std::vector<int64_t> told;
    const io::ModelExport together(checkpoint, target("together"), at::kBFloat16,
                                   /*shard_bytes=*/400, format);
    const auto names = write_export(together, world_, [&](int64_t done) { told.push_back(done); });
    if (world_.is_root()) {
      const io::ModelExport alone(checkpoint, target("alone"), at::kBFloat16, 400, format);
      alone.begin();
      for (int64_t shard = 0; shard < alone.shards(); ++shard) alone.write_shard(shard);
      alone.finish();
      EXPECT_EQ(names, alone.files());
    }
    world_.barrier();
    expect_equal(list_outputs(target("together"), world_), list_outputs(target("alone"), world_));
    EXPECT_GT(names.size(), 5u);  // config, tokenizer, index and shards
    EXPECT_EQ(told.back(), static_cast<int64_t>(names.size()) - 3);
    const io::Checkpoint written = io::Checkpoint::open(target("together"));
    EXPECT_EQ(written.names(), checkpoint.names());
    EXPECT_EQ(written.packing("sparse") != nullptr, format != io::PackFormat::dense);
  }
}

}  // namespace
}  // namespace espalier::driver
