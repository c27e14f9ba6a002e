#include "pipeline/io/checkpoint.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "pipeline/io/atomic_file.h"
#include "temporary_directory.h"

namespace espalier::io {
namespace {

namespace fs = std::filesystem;
using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

Tensors small_model() {
  return {{"model.embed_tokens.weight",
           at::arange(0, 24, at::kFloat).reshape({6, 4}).to(at::kBFloat16)},
          {"model.layers.0.up.weight",
           at::arange(24, 40, at::kFloat).reshape({4, 4}).to(at::kBFloat16)},
          {"model.norm.weight", at::ones({4}, at::kBFloat16)},
          {"positions", at::arange(5, at::kLong)}};
}

fs::path write_model(const fs::path& directory, const Tensors& tensors = small_model()) {
  write_safetensors(directory / "model.safetensors", tensors);
  write_file(directory / "config.json", R"({"hidden_size":4,"torch_dtype":"bfloat16"})");
  return directory;
}

/// A directory over `base` in which the up projection is replaced.
fs::path write_child(const fs::path& directory, const fs::path& base, double value) {
  write_safetensors(directory / "pruned.safetensors",
                    {{"model.layers.0.up.weight", at::full({4, 4}, value, at::kBFloat16)}});
  write_derived(directory, Checkpoint::open(base));
  return directory;
}

void expect_same_tensors(const Checkpoint& a, const Checkpoint& b) {
  ASSERT_EQ(a.names(), b.names());
  for (const std::string& name : a.names())
    EXPECT_TRUE(at::equal(a.view(name), b.view(name))) << name;
}

TEST(Checkpoint, OpensAPlainDirectory) {
  const TemporaryDirectory directory;
  const Checkpoint model = Checkpoint::open(write_model(directory / "m"));
  EXPECT_EQ(model.names(),
            (std::vector<std::string>{"model.embed_tokens.weight", "model.layers.0.up.weight",
                                      "model.norm.weight", "positions"}));
  EXPECT_EQ(model.config().at("hidden_size"), 4);
  EXPECT_EQ(model.root(), directory / "m");
  EXPECT_EQ(model.bytes(), 24 * 2 + 16 * 2 + 4 * 2 + 5 * 8);
  EXPECT_TRUE(model.has("positions"));
  EXPECT_EQ(model.info("positions").shape, std::vector<int64_t>{5});
  for (const auto& [name, tensor] : small_model()) EXPECT_TRUE(at::equal(model.view(name), tensor));
}

TEST(Checkpoint, AnEmptyTensorsChecksumIsNotThatOfTheTensorBehindIt) {
  const TemporaryDirectory directory;
  const Checkpoint model = Checkpoint::open(write_model(
      directory / "m", {{"empty", at::empty({0}, at::kFloat)}, {"full", at::ones({4})}}));
  const std::string full = model.tensor_checksum("full");
  EXPECT_NE(model.tensor_checksum("empty"), full);
  EXPECT_EQ(model.tensor_checksum("full"), full);
}

TEST(Checkpoint, ShardsAndOneFileHoldTheSameModel) {
  const TemporaryDirectory directory;
  const Checkpoint model = Checkpoint::open(write_model(directory / "m"));
  write_dense(model, directory / "sharded", at::kBFloat16, 50);
  EXPECT_TRUE(fs::exists(directory / "sharded/model-00001-of-00003.safetensors"));
  const Checkpoint sharded = Checkpoint::open(directory / "sharded");
  expect_same_tensors(model, sharded);
  EXPECT_EQ(model.tensors_checksum(), sharded.tensors_checksum());
}

TEST(Checkpoint, WhatIsNoModelIsRefusedWithTheWayOut) {
  const TemporaryDirectory directory;
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "none"); }),
                  {(directory / "none").string(), "no such model directory"});
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory.path()); }),
                  {"model.safetensors.index.json"});
  write_file(directory / "pickled/pytorch_model.bin", "x");
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "pickled"); }),
                  {"pytorch_model.bin", "save_pretrained"});
}

TEST(Checkpoint, ABadConfigIsNamedAndAMissingOneOnlyWhenAskedFor) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  write_file(directory / "m/config.json", std::string(1000, '['));
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "m"); }),
                  {"config.json", "nested deeper than 64"});
  write_file(directory / "m/config.json", "{");
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "m"); }),
                  {"config.json", "not valid JSON"});
  write_file(directory / "m/config.json", "[]");
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "m"); }),
                  {"config.json", "not a JSON object"});
  write_file(directory / "m/config.json", fmt::format("\"{:{}}\"", "", 17 << 20));
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "m"); }),
                  {"config.json", "16777216"});
  fs::remove(directory / "m/config.json");
  const Checkpoint model = Checkpoint::open(directory / "m");
  expect_contains(message_of<UserError>([&] { model.config(); }), {"config.json", "no such file"});
}

std::string index_refusal(const TemporaryDirectory& directory, const std::string& index) {
  write_safetensors(directory / "m/a.safetensors", {{"x", at::ones({1})}});
  write_safetensors(directory / "outside.safetensors", {{"y", at::ones({1})}});
  write_file(directory / "m/model.safetensors.index.json", index);
  const std::string message = message_of<UserError>([&] { Checkpoint::open(directory / "m"); });
  expect_contains(message, {"model.safetensors.index.json"});
  return message;
}

TEST(Checkpoint, AnIndexThatNamesAMissingFileOrTensorIsRefused) {
  const TemporaryDirectory directory;
  expect_contains(index_refusal(directory, R"({"weight_map":{"x":"b.safetensors"}})"),
                  {"\"x\"", "b.safetensors", "incomplete"});
  expect_contains(index_refusal(directory, R"({"weight_map":{"y":"a.safetensors"}})"),
                  {"\"y\"", "a.safetensors", "does not hold it"});
  expect_contains(index_refusal(directory, R"({"weights":{}})"), {"weight_map"});
  expect_contains(index_refusal(directory, "3"), {"weight_map"});
  expect_contains(index_refusal(directory, R"({"weight_map":{"x":"a.safetensors","x":"a"}})"),
                  {"\"x\" stands twice"});
}

TEST(Checkpoint, AnIndexReadsOnlyFilesBesideIt) {
  const TemporaryDirectory directory;
  const std::string absolute = (directory / "outside.safetensors").string();
  for (const std::string& name :
       {std::string("\"../outside.safetensors\""), fmt::format("\"{}\"", absolute),
        std::string("\"..\""), std::string("\"\""), std::string("7")}) {
    expect_contains(index_refusal(directory, fmt::format("{{\"weight_map\":{{\"y\":{}}}}}", name)),
                    {"\"y\"", "not the name of a file beside the index"});
  }
}

TEST(DerivedCheckpoint, ShowsItsOwnTensorsOverThoseOfItsBase) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  write_child(directory / "a", directory / "m", 1);
  write_child(directory / "b", directory / "a", 2);
  const Checkpoint model = Checkpoint::open(directory / "b");
  EXPECT_EQ(model.root(), directory / "m");
  EXPECT_EQ(model.chain().size(), 3u);
  EXPECT_EQ(model.config().at("hidden_size"), 4);
  EXPECT_TRUE(
      at::equal(model.view("model.layers.0.up.weight"), at::full({4, 4}, 2, at::kBFloat16)));
  EXPECT_TRUE(at::equal(model.view("positions"), at::arange(5, at::kLong)));
  model.verify_base();
}

TEST(DerivedCheckpoint, HasTheChecksumOfItsDenseExport) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  const Checkpoint model = Checkpoint::open(write_child(directory / "a", directory / "m", 1));
  write_dense(model, directory / "dense", at::kBFloat16);
  const Checkpoint dense = Checkpoint::open(directory / "dense");
  expect_same_tensors(model, dense);
  EXPECT_EQ(model.tensors_checksum(), dense.tensors_checksum());
  EXPECT_NE(model.tensors_checksum(), Checkpoint::open(directory / "m").tensors_checksum());
}

TEST(DerivedCheckpoint, ARunDirectoryCanBeMoved) {
  const TemporaryDirectory directory;
  write_model(directory / "run/01-start/model");
  write_child(directory / "run/02-prune/model", directory / "run/01-start/model", 1);
  fs::rename(directory / "run", directory / "moved");
  EXPECT_EQ(Checkpoint::open(directory / "moved/02-prune/model").names().size(), 4u);
}

TEST(DerivedCheckpoint, ABaseOutsideTheRunIsNamedAbsolutely) {
  const TemporaryDirectory directory;
  write_model(directory / "models/llama");
  write_child(directory / "outputs/run/02-prune/model", directory / "models/llama", 1);
  fs::rename(directory / "outputs/run", directory / "elsewhere");
  EXPECT_EQ(Checkpoint::open(directory / "elsewhere/02-prune/model").names().size(), 4u);
}

TEST(DerivedCheckpoint, AnotherModelInThePlaceOfTheBaseIsRefused) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  write_child(directory / "a", directory / "m", 1);
  Tensors other = small_model();
  other[0].second = other[0].second + 1;
  write_model(directory / "m", other);
  expect_contains(
      message_of<UserError>([&] { Checkpoint::open(directory / "a"); }),
      {(directory / "a/derived.json").string(), "not the model that it was derived from"});
  fs::remove_all(directory / "m");
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "a"); }),
                  {"derived.json", (directory / "m").string(), "is no model"});
}

TEST(DerivedCheckpoint, OneAlteredValueInTheBaseIsFoundByVerifying) {
  const TemporaryDirectory directory;
  Tensors big{{"w", at::zeros({4096}, at::kFloat)}};
  write_model(directory / "m", big);
  write_child(directory / "a", directory / "m", 1);
  big[0].second[1000] = 1;  // none of the sampled bytes
  write_model(directory / "m", big);
  const Checkpoint model = Checkpoint::open(directory / "a");
  expect_contains(message_of<UserError>([&] { model.verify_base(); }),
                  {"derived.json", "was altered"});
}

TEST(DerivedCheckpoint, AChainThatLeadsBackToItselfIsRefused) {
  const TemporaryDirectory directory;
  const char* const to_b = R"({"base":"../b","base_checksum":"","base_fingerprint":""})";
  const char* const to_a = R"({"base":"../a","base_checksum":"","base_fingerprint":""})";
  write_file(directory / "a/derived.json", to_b);
  write_file(directory / "b/derived.json", to_a);
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "a"); }),
                  {"stands on itself"});
}

TEST(DerivedCheckpoint, AChainThatIsTooLongIsRefused) {
  const TemporaryDirectory directory;
  for (int i = 0; i < 70; ++i) {
    write_file(directory / fmt::format("d{}", i) / "derived.json",
               fmt::format("{{\"base\":\"../d{}\"}}", i + 1));
  }
  fs::create_directory(directory / "d70");
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "d0"); }),
                  {(directory / "d0").string(), "more than 64"});
}

TEST(DerivedCheckpoint, ATensorInTwoFilesOfOneDirectoryIsRefused) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  write_child(directory / "a", directory / "m", 1);
  write_safetensors(directory / "a/second.safetensors",
                    {{"model.layers.0.up.weight", at::ones({4, 4}, at::kBFloat16)}});
  expect_contains(message_of<UserError>([&] { Checkpoint::open(directory / "a"); }),
                  {"model.layers.0.up.weight", "pruned.safetensors", "second.safetensors"});
}

TEST(DenseExport, CastsFloatsOnlyAndSaysSoInTheConfig) {
  const TemporaryDirectory directory;
  const Checkpoint model = Checkpoint::open(write_model(directory / "m"));
  write_dense(model, directory / "out", at::kFloat);
  const Checkpoint out = Checkpoint::open(directory / "out");
  EXPECT_EQ(out.info("model.norm.weight").dtype, at::kFloat);
  EXPECT_EQ(out.info("positions").dtype, at::kLong);
  EXPECT_EQ(out.config().at("torch_dtype"), "float32");
  EXPECT_FALSE(out.config().contains("dtype"));
  EXPECT_EQ(SafetensorsFile(directory / "out/model.safetensors").metadata().at("format"), "pt");
  EXPECT_TRUE(
      at::equal(out.view("model.layers.0.up.weight"), small_model()[1].second.to(at::kFloat)));
}

TEST(DenseExport, CarriesTokenizerFilesAndNothingElse) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                           "special_tokens_map.json", "generation_config.json",
                           "chat_template.jinja", "tokenizer.model"}) {
    write_file(directory / "m" / name, name);
  }
  write_file(directory / "m/modeling.py", "import os");
  write_file(directory / "m/optimizer.pt", "x");
  write_dense(Checkpoint::open(directory / "m"), directory / "out", at::kBFloat16);
  EXPECT_EQ(read_file(directory / "out/tokenizer.model"), "tokenizer.model");
  EXPECT_EQ(read_file(directory / "out/chat_template.jinja"), "chat_template.jinja");
  EXPECT_FALSE(fs::exists(directory / "out/modeling.py"));
  EXPECT_EQ(std::distance(fs::directory_iterator(directory / "out"), {}), 10);
}

TEST(DenseExport, RemovesWhatAnEarlierExportLeft) {
  const TemporaryDirectory directory;
  const Checkpoint model = Checkpoint::open(write_model(directory / "m"));
  write_dense(model, directory / "out", at::kBFloat16, 50);
  write_file(directory / "out/derived.json", "{}");
  write_file(directory / "out/.model-00001-of-00003.safetensors.espalier-tmp-Ab12Cd", "killed");
  write_dense(model, directory / "out", at::kBFloat16);
  EXPECT_FALSE(fs::exists(directory / "out/.model-00001-of-00003.safetensors.espalier-tmp-Ab12Cd"));
  EXPECT_FALSE(fs::exists(directory / "out/derived.json"));
  EXPECT_FALSE(fs::exists(directory / "out/model.safetensors.index.json"));
  EXPECT_FALSE(fs::exists(directory / "out/model-00001-of-00003.safetensors"));
  write_dense(model, directory / "out", at::kBFloat16, 80);
  EXPECT_FALSE(fs::exists(directory / "out/model.safetensors"));
  EXPECT_EQ(model.tensors_checksum(), Checkpoint::open(directory / "out").tensors_checksum());
}

TEST(DenseExport, MayReplaceItsOwnWeightsAndNoOthers) {
  const TemporaryDirectory directory;
  const Checkpoint model = Checkpoint::open(write_model(directory / "theirs"));
  require_overwritable(model, directory / "out");
  write_dense(model, directory / "out", at::kBFloat16, 50);
  require_overwritable(model, directory / "out");
  const auto refusal = [&](const std::string& name) {
    return message_of<UserError>([&] { require_overwritable(model, directory / name); });
  };
  expect_contains(refusal("theirs"), {(directory / "theirs").string(), "model.safetensors"});
  write_file(directory / "out/derived.json", "{}");
  expect_contains(refusal("out"), {(directory / "out").string(), "derived.json"});
}

TEST(DenseExport, NeverOverwritesAModelItReads) {
  const TemporaryDirectory directory;
  write_model(directory / "m");
  write_child(directory / "a", directory / "m", 1);
  const Checkpoint model = Checkpoint::open(write_child(directory / "b", directory / "a", 2));
  for (const char* name : {"m", "a", "b"}) {
    expect_contains(
        message_of<UserError>([&] { write_dense(model, directory / name, at::kFloat); }),
        {(directory / name).string(), "overwrite"});
  }
}

}  // namespace
}  // namespace espalier::io
