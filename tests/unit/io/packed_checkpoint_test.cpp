// A packed export is, to whoever opens it, the dense model.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "temporary_directory.h"

namespace espalier::io {
namespace {

namespace fs = std::filesystem;
using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

/// rows x columns with `keep` numbers in every four of a row, some of them negative zeros.
at::Tensor pattern(int64_t rows, int64_t columns, int64_t keep) {
  at::manual_seed(static_cast<uint64_t>(rows));
  const at::Tensor kept = at::rand({rows * columns / 4, 4})
                              .argsort(/*dim=*/int64_t{1})
                              .argsort(/*dim=*/int64_t{1})
                              .lt(keep);
  const at::Tensor numbers = at::arange(1, rows * columns + 1, at::kFloat);
  const at::Tensor values = numbers.mul(numbers.remainder(7).ne(0)).neg();
  return at::where(kept.reshape({-1}), values, at::zeros_like(values))
      .reshape({rows, columns})
      .to(at::kBFloat16);
}

Tensors sparse_model() {
  at::Tensor chance = pattern(32, 40, 2);
  chance[0].slice(0, 0, 4).fill_(1);  // no 2:4
  return {{"block.chance.weight", chance},
          {"block.pattern.weight", pattern(24, 40, 2)},
          {"block.stored_in_out.weight", pattern(24, 36, 1).t().contiguous()},
          {"embedding.weight", at::arange(1, 121, at::kFloat).reshape({12, 10}).to(at::kBFloat16)},
          {"norm.weight", at::zeros({24}, at::kBFloat16)},
          {"positions", at::arange(5, at::kLong)}};
}

Checkpoint write_model(const fs::path& directory, const Tensors& tensors = sparse_model()) {
  write_safetensors(directory / "model.safetensors", tensors);
  write_file(directory / "config.json", R"({"hidden_size":4,"torch_dtype":"bfloat16"})");
  return Checkpoint::open(directory);
}

Checkpoint exported(const Checkpoint& model, const fs::path& directory, PackFormat format,
                    int64_t shard_bytes = kShardBytes) {
  const ModelExport whole(model, directory, at::kBFloat16, shard_bytes, format);
  whole.begin();
  for (int64_t shard = 0; shard < whole.shards(); ++shard) whole.write_shard(shard);
  whole.finish();
  for (const std::string& name : whole.files()) EXPECT_TRUE(fs::exists(directory / name)) << name;
  return Checkpoint::open(directory);
}

std::string packing_of(const Checkpoint& model, const std::string& name) {
  const Packing* packing = model.packing(name);
  return packing == nullptr ? "" : packing->name();
}

TEST(PackedCheckpoint, IsTheDenseModelInEveryAnswer) {
  const TemporaryDirectory directory;
  const Checkpoint dense = write_model(directory / "m");
  int number = 0;
  for (const auto format : {PackFormat::bitmask, PackFormat::nm}) {
    for (const int64_t shard_bytes : {kShardBytes, int64_t{3000}}) {
      const Checkpoint packed =
          exported(dense, directory / std::to_string(number++), format, shard_bytes);
      ASSERT_EQ(packed.names(), dense.names());
      for (const std::string& name : dense.names()) {
        EXPECT_EQ(packed.info(name).shape, dense.info(name).shape) << name;
        EXPECT_EQ(packed.info(name).dtype, dense.info(name).dtype) << name;
        EXPECT_TRUE(at::equal(packed.view(name), dense.view(name))) << name;
        packed.drop(name);
        EXPECT_EQ(packed.tensor_checksum(name), dense.tensor_checksum(name)) << name;
      }
      EXPECT_EQ(packed.tensors_checksum(), dense.tensors_checksum());
      EXPECT_EQ(packed.fingerprint(), dense.fingerprint());
      EXPECT_EQ(packed.bytes(), dense.bytes());
      const bool nm = format == PackFormat::nm;
      EXPECT_EQ(packing_of(packed, "block.chance.weight"), "bitmask");
      EXPECT_EQ(packing_of(packed, "block.pattern.weight"), nm ? "2:4" : "bitmask");
      EXPECT_EQ(packing_of(packed, "block.stored_in_out.weight"), nm ? "1:4" : "bitmask");
      for (const char* name : {"embedding.weight", "norm.weight", "positions"})
        EXPECT_EQ(packing_of(packed, name), "") << name;
    }
  }
}

TEST(PackedCheckpoint, ExportedDenseIsTheFilesOfTheDenseModel) {
  const TemporaryDirectory directory;
  const Checkpoint model = write_model(directory / "m");
  exported(model, directory / "dense", PackFormat::dense, 3000);
  const Checkpoint packed = exported(model, directory / "packed", PackFormat::nm, 3000);
  exported(packed, directory / "again", PackFormat::dense, 3000);
  int files = 0;
  for (const auto& entry : fs::directory_iterator(directory / "dense")) {
    const std::string name = entry.path().filename().string();
    EXPECT_EQ(read_file(directory / "again" / name), read_file(entry.path())) << name;
    ++files;
  }
  EXPECT_GE(files, 4);  // config.json, index, shards
}

TEST(PackedCheckpoint, AModelDerivedFromItStandsOnTheDenseOneToo) {
  const TemporaryDirectory directory;
  const Checkpoint model = write_model(directory / "m");
  write_safetensors(directory / "child/changed.safetensors",
                    {{"norm.weight", at::ones({24}, at::kBFloat16)}});
  write_derived(directory / "child", exported(model, directory / "base", PackFormat::nm));
  fs::remove_all(directory / "base");
  exported(model, directory / "base", PackFormat::dense);
  const Checkpoint child = Checkpoint::open(directory / "child");
  child.verify_base();
  EXPECT_TRUE(at::equal(child.view("norm.weight"), at::ones({24}, at::kBFloat16)));
}

TEST(PackedCheckpoint, AndADenseOneReplaceEachOtherInADirectory) {
  const TemporaryDirectory directory;
  const Checkpoint model = write_model(directory / "m");
  const PackFormat formats[] = {PackFormat::dense, PackFormat::nm, PackFormat::dense};
  for (const auto format : formats) {
    const Checkpoint written = exported(model, directory / "out", format, 3000);
    EXPECT_EQ(written.tensors_checksum(), model.tensors_checksum());
    for (const auto& entry : fs::directory_iterator(directory / "out")) {
      const std::string name = entry.path().filename().string();
      EXPECT_EQ(name.starts_with("packed_"), format != PackFormat::dense && name != "config.json")
          << name;
    }
  }
}

TEST(PackedCheckpoint, LeavesATensorWholeWhosePartsWouldTakeAnothersName) {
  const TemporaryDirectory directory;
  const Checkpoint model = write_model(
      directory / "m", {{"a", pattern(8, 8, 2)}, {"a.values", at::ones({3}, at::kBFloat16)}});
  const Checkpoint packed = exported(model, directory / "packed", PackFormat::bitmask);
  EXPECT_EQ(packing_of(packed, "a"), "");
  EXPECT_EQ(packed.tensors_checksum(), model.tensors_checksum());
}

TEST(PackedCheckpoint, DamagedBitsAreRefusedWithFileAndTensor) {
  const TemporaryDirectory directory;
  const Checkpoint model = write_model(directory / "m", {{"a.weight", pattern(8, 8, 2)}});
  const fs::path file = directory / "packed/packed_model.safetensors";
  exported(model, directory / "packed", PackFormat::bitmask);
  const int64_t begin = SafetensorsFile(file).tensors().at("a.weight.bits").begin;
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekp(begin);
  stream.put('\xff').flush();
  const Checkpoint packed = Checkpoint::open(directory / "packed");
  for (const std::string& message : {message_of<UserError>([&] { packed.view("a.weight"); }),
                                     message_of<UserError>([&] { packed.fingerprint(); })})
    expect_contains(message, {file.string(), "\"a.weight\"", "bits are set for"});
}

TEST(PackedCheckpoint, OfPartsKeepsTheLibrarysNames) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "m/unet/diffusion_pytorch_model.safetensors",
                    {{"up.weight", pattern(8, 16, 2)}});
  write_safetensors(directory / "m/text_encoder/model.safetensors",
                    {{"up.weight", pattern(8, 24, 1)}});
  write_file(directory / "m/model_index.json", "{}");
  const Checkpoint model = Checkpoint::open(directory / "m");
  const Checkpoint packed = exported(model, directory / "packed", PackFormat::bitmask);
  EXPECT_TRUE(fs::exists(directory / "packed/unet/packed_diffusion_pytorch_model.safetensors"));
  EXPECT_EQ(packing_of(packed, "unet/up.weight"), "bitmask");
  EXPECT_EQ(packed.tensors_checksum(), model.tensors_checksum());
  exported(packed, directory / "dense", PackFormat::dense);
  EXPECT_TRUE(fs::exists(directory / "dense/unet/diffusion_pytorch_model.safetensors"));
  EXPECT_TRUE(fs::exists(directory / "dense/text_encoder/model.safetensors"));
}

}  // namespace
}  // namespace espalier::io
