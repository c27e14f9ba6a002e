#include "pipeline/io/safetensors.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <limits>

#include "temporary_directory.h"

namespace espalier::io {
namespace {

/// A file of the given header text and that many bytes of data.
std::filesystem::path raw_file(const std::filesystem::path& path, const std::string& header,
                               size_t data_bytes, int64_t claimed_length = -1) {
  const uint64_t length =
      claimed_length < 0 ? header.size() : static_cast<uint64_t>(claimed_length);
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << header << std::string(data_bytes, '\1');
  return path;
}

std::string refusal(const std::string& header, size_t data_bytes, int64_t claimed_length = -1) {
  const TemporaryDirectory directory;
  const auto path = raw_file(directory / "hostile.safetensors", header, data_bytes, claimed_length);
  const std::string message = message_of<UserError>([&] { SafetensorsFile file(path); });
  expect_contains(message, {path.string()});
  return message;
}

TEST(Safetensors, WhatIsWrittenIsReadBackInEveryDtype) {
  const TemporaryDirectory directory;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto dtype : {at::kBool, at::kByte, at::kChar, at::kShort, at::kInt, at::kLong,
                           at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    tensors.emplace_back(std::string("layer.") + c10::toString(dtype),
                         at::arange(1, 16).remainder(2).reshape({3, 5}).to(dtype));
  }
  tensors.emplace_back("scalar", at::scalar_tensor(2.5, at::kFloat));
  tensors.emplace_back("empty", at::empty({0, 7}, at::kFloat));
  write_safetensors(directory / "all.safetensors", tensors,
                    {{"format", "pt"}, {"who", "\xc3\xa9"}});

  const SafetensorsFile file(directory / "all.safetensors");
  EXPECT_EQ(file.tensors().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("who"), "\xc3\xa9");
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor view = file.view(name);
    EXPECT_EQ(view.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(view, tensor)) << name;
  }
}

TEST(Safetensors, AViewOutlivesTheFileObjectAndSurvivesDrop) {
  const TemporaryDirectory directory;
  const at::Tensor values = at::arange(100000, at::kFloat);
  write_safetensors(directory / "a.safetensors", {{"a", values}});
  at::Tensor view;
  {
    const SafetensorsFile file(directory / "a.safetensors");
    view = file.view("a");
    file.drop("a");
  }
  EXPECT_TRUE(at::equal(view, values));
}

int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

TEST(Safetensors, DropGivesTheMemoryBack) {
  const TemporaryDirectory directory;
  constexpr int64_t kBytes = 64 << 20;
  write_safetensors(directory / "a.safetensors", {{"a", at::ones({kBytes}, at::kChar)}});
  const SafetensorsFile file(directory / "a.safetensors");
  const int64_t before = resident_bytes();
  EXPECT_EQ(file.view("a").sum().item<int64_t>(), kBytes);
  EXPECT_GT(resident_bytes(), before + kBytes * 3 / 4);
  file.drop("a");
  EXPECT_LT(resident_bytes(), before + kBytes / 4);
}

TEST(Safetensors, DataThatAreNotAlignedToTheirElementAreReadRight) {
  const TemporaryDirectory directory;
  const at::Tensor number = at::tensor({1.5, -2.25}, at::kDouble);
  write_safetensors(directory / "a.safetensors",
                    {{"flag", at::ones({3}, at::kBool)}, {"number", number}});
  const SafetensorsFile file(directory / "a.safetensors");
  EXPECT_NE(file.tensors().at("number").begin % 8, 0);
  const at::Tensor view = file.view("number");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view.const_data_ptr()) % 8, 0u);
  EXPECT_TRUE(at::equal(view, number));
}

TEST(Safetensors, TheHeaderIsPaddedToEightBytes) {
  const TemporaryDirectory directory;
  for (const std::string name : {"a", "ab", "abc", "abcd"}) {
    write_safetensors(directory / "a.safetensors", {{name, at::ones({1}, at::kDouble)}});
    EXPECT_EQ(SafetensorsFile(directory / "a.safetensors").tensors().at(name).begin % 8, 0);
  }
}

TEST(Safetensors, AnUnfinishedFileIsNotThere) {
  const TemporaryDirectory directory;
  {
    SafetensorsWriter writer(directory / "a.safetensors", {{"a", at::kFloat, {2}}});
    EXPECT_THROW(writer.commit(), DefectError);
    EXPECT_THROW(writer.append(at::ones({3})), DefectError);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(Safetensors, AMissingFileADirectoryAndAMissingTensorAreNamed) {
  const TemporaryDirectory directory;
  expect_contains(message_of<UserError>([&] { SafetensorsFile file(directory / "none"); }),
                  {(directory / "none").string(), "No such file"});
  expect_contains(message_of<UserError>([&] { SafetensorsFile file(directory.path()); }),
                  {"not a regular file"});
  write_safetensors(directory / "a", {{"a", at::ones({1})}});
  expect_contains(message_of<UserError>([&] { SafetensorsFile(directory / "a").view("b"); }),
                  {(directory / "a").string(), "\"b\""});
}

const char* const kGood = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

TEST(HostileSafetensors, AFileShorterThanItsLengthField) {
  const TemporaryDirectory directory;
  std::ofstream(directory / "a") << "abc";
  std::ofstream(directory / "b");
  expect_contains(message_of<UserError>([&] { SafetensorsFile file(directory / "a"); }),
                  {"has 3 bytes"});
  expect_contains(message_of<UserError>([&] { SafetensorsFile file(directory / "b"); }),
                  {"has 0 bytes"});
}

TEST(HostileSafetensors, AHeaderThatClaimsMoreThanIsAllowedOrThere) {
  expect_contains(refusal(kGood, 8, 100'000'001), {"100000001", "100000000"});
  expect_contains(refusal(kGood, 8, std::numeric_limits<int64_t>::max()), {"at most 100000000"});
  expect_contains(refusal(kGood, 8, 5000), {"ends at byte 5008", "cut off"});
}

TEST(HostileSafetensors, DataCutOff) {
  expect_contains(refusal(kGood, 7), {"\"a\"", "end at byte 8", "7 bytes of data", "cut off"});
}

TEST(HostileSafetensors, OverlappingTensors) {
  expect_contains(refusal(R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},
                              "b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}})",
                          12),
                  {"\"b\"", "byte 4", "inside tensor \"a\"", "ends at 8"});
}

TEST(HostileSafetensors, HolesBetweenBeforeAndAfterTensors) {
  expect_contains(refusal(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                              "b":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}})",
                          10),
                  {"bytes 4 to 6", "\"b\"", "no tensor"});
  expect_contains(refusal(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}})", 5),
                  {"bytes 0 to 1", "\"a\""});
  expect_contains(refusal(kGood, 11), {"last 3 bytes"});
}

TEST(HostileSafetensors, OffsetsBeyondTheFileBackwardsOrNotIntegers) {
  const auto with_offsets = [](const std::string& offsets) {
    return refusal(std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)")
                       .append(offsets)
                       .append("}}"),
                   4);
  };
  expect_contains(with_offsets("[9223372036854775800,9223372036854775804]"), {"\"a\"", "4 bytes"});
  expect_contains(with_offsets("[4,0]"), {"begin at 4", "at 0"});
  for (const char* bad :
       {"[-4,0]", "[0,4.0]", "[0]", "[0,4,8]", "\"x\"", "[0,1e30]", "[0,18446744073709551615]"}) {
    expect_contains(with_offsets(bad), {"\"a\"", "not two integers"});
  }
}

TEST(HostileSafetensors, AnUnknownDtypeIsNamedWithThoseThatAreRead) {
  expect_contains(refusal(R"({"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}})", 4),
                  {"\"w\"", "F8_E4M3", "BF16"});
  expect_contains(refusal(R"({"w":{"dtype":7,"shape":[4],"data_offsets":[0,4]}})", 4), {"dtype 7"});
}

TEST(HostileSafetensors, ShapesThatAreNegativeOverflowOrDisagreeWithTheBytes) {
  const auto with_shape = [](const std::string& shape) {
    return refusal(std::string(R"({"a":{"dtype":"F32","data_offsets":[0,8],"shape":)")
                       .append(shape)
                       .append("}}"),
                   8);
  };
  expect_contains(with_shape("[-2]"), {"\"a\"", "-2", "not an integer"});
  expect_contains(with_shape("[2.0]"), {"2.0"});
  expect_contains(with_shape("[18446744073709551615]"), {"18446744073709551615"});
  expect_contains(with_shape("[4294967296,4294967296]"), {"more bytes than 2^63"});
  // 2^62 * 4 bytes wraps around to 0; the zero hides an overflow of the strides.
  expect_contains(with_shape("[4611686018427387904]"), {"more bytes than 2^63"});
  expect_contains(with_shape("[0,4294967296,4294967296]"), {"more bytes than 2^63"});
  expect_contains(with_shape("[3]"), {"need 12 bytes", "[0, 8]"});
  expect_contains(with_shape("{}"), {"not an array"});
}

TEST(HostileSafetensors, ATensorNamedTwice) {
  expect_contains(refusal(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                              "a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                          8),
                  {"\"a\" stands twice"});
}

TEST(HostileSafetensors, HeadersThatAreNotTheJsonOfAHeader) {
  expect_contains(refusal("{\"a\":", 0), {"not valid JSON at byte"});
  expect_contains(refusal("{\"a\xff\":1}", 0), {"not valid JSON"});
  expect_contains(refusal("[1]", 0), {"not a JSON object"});
  expect_contains(refusal("", 0), {"not valid JSON"});
  expect_contains(refusal(R"({"a":3})", 0), {"\"a\"", "not an object"});
  expect_contains(refusal(R"({"a":{"shape":[],"data_offsets":[0,0]}})", 0), {"no \"dtype\""});
  expect_contains(refusal(R"({"__metadata__":{"x":1}})", 0), {"__metadata__", "\"x\""});
}

TEST(HostileSafetensors, DeepNestingEndsInAMessageNotInTheStack) {
  expect_contains(refusal(std::string(5'000'000, '['), 0), {"nested deeper than 8"});
  std::string objects;
  for (int i = 0; i < 1'000'000; ++i) objects += "{\"a\":";
  expect_contains(refusal(objects, 0), {"nested deeper than 8"});
}

}  // namespace
}  // namespace espalier::io
