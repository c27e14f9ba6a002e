#include "pipeline/io/manifest.h"

#include <gtest/gtest.h>

#include "pipeline/io/atomic_file.h"
#include "temporary_directory.h"

namespace espalier::io {
namespace {

namespace fs = std::filesystem;

Manifest finished_stage(const TemporaryDirectory& directory) {
  write_file(directory / "model/w.safetensors", "weights");
  write_file(directory / "masks.h5", "masks");
  Manifest manifest;
  manifest.stage = "prune";
  manifest.key = "00ff";
  manifest.status = "finished";
  manifest.seconds = 1.5;
  manifest.peak_resident_bytes = {100, int64_t{1} << 40};
  manifest.bytes_sent = {0, 7};
  manifest.outputs = list_outputs(directory.path());
  manifest.facts = {{"device", "cpu"}, {"ranks", 2}};
  write_manifest(directory.path(), manifest);
  return manifest;
}

TEST(Manifest, IsReadAsItWasWritten) {
  const TemporaryDirectory directory;
  EXPECT_FALSE(read_manifest(directory.path()).has_value());
  const Manifest written = finished_stage(directory);
  const Manifest read = read_manifest(directory.path()).value();
  EXPECT_EQ(read.stage, "prune");
  EXPECT_EQ(read.key, "00ff");
  EXPECT_EQ(read.status, "finished");
  EXPECT_EQ(read.seconds, 1.5);
  EXPECT_EQ(read.peak_resident_bytes, written.peak_resident_bytes);
  EXPECT_EQ(read.bytes_sent, written.bytes_sent);
  EXPECT_EQ(read.facts, written.facts);
  ASSERT_EQ(read.outputs.size(), 2u);
  EXPECT_EQ(read.outputs[0].path, "masks.h5");
  EXPECT_EQ(read.outputs[1].path, "model/w.safetensors");
  EXPECT_EQ(read.outputs[1].bytes, 7);
  EXPECT_EQ(damaged_output(directory.path(), read), "");
}

TEST(Manifest, ListsNeitherItselfNorStateNorTemporaryFiles) {
  const TemporaryDirectory directory;
  finished_stage(directory);
  write_file(directory / "state/block-3.h5", "x");
  write_file(directory / "model/.w.safetensors.espalier-tmp-AbCdEf", "x");
  write_file(directory / "model/state/kept", "x");
  const auto outputs = list_outputs(directory.path());
  ASSERT_EQ(outputs.size(), 3u);
  EXPECT_EQ(outputs[1].path, "model/state/kept");
}

TEST(Manifest, ADamagedOutputIsFoundWithTheReason) {
  const TemporaryDirectory directory;
  const Manifest manifest = finished_stage(directory);
  write_file(directory / "masks.h5", "mAsks");
  expect_contains(damaged_output(directory.path(), manifest), {"masks.h5", "checksum"});
  write_file(directory / "masks.h5", "mask");
  expect_contains(damaged_output(directory.path(), manifest), {"masks.h5", "4 bytes", "says 5"});
  fs::remove(directory / "masks.h5");
  expect_contains(damaged_output(directory.path(), manifest), {"masks.h5", "missing"});
}

std::string refusal(const std::string& text) {
  const TemporaryDirectory directory;
  write_file(directory / "manifest.json", text);
  const std::string message = message_of<UserError>([&] { read_manifest(directory.path()); });
  expect_contains(message, {(directory / "manifest.json").string()});
  return message;
}

TEST(Manifest, ThatDoesNotParseIsRefusedWithTheWayOut) {
  expect_contains(refusal("{"), {"not valid JSON"});
  expect_contains(refusal("[]"), {"not an object", "remove the file"});
  expect_contains(refusal("{}"), {"has no \"stage\""});
  expect_contains(refusal(R"({"stage":1})"), {"\"stage\" is not a text"});
  const std::string start =
      R"({"stage":"a","key":"b","status":"c","facts":{},"bytes_sent":[],"peak_resident_bytes":[],)";
  expect_contains(refusal(start + R"("seconds":"x","outputs":[]})"), {"\"seconds\""});
  expect_contains(
      refusal(start + R"("seconds":1,"outputs":[{"path":"../../x","bytes":1,"checksum":""}]})"),
      {"../../x", "leads out"});
  expect_contains(
      refusal(start + R"("seconds":1,"outputs":[{"path":"/x","bytes":1,"checksum":""}]})"),
      {"leads out"});
  expect_contains(
      refusal(start + R"("seconds":1,"outputs":[{"path":"x","bytes":-1,"checksum":""}]})"),
      {"\"bytes\""});
}

}  // namespace
}  // namespace espalier::io
