#include "pipeline/io/hdf5.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <functional>

#include "pipeline/io/atomic_file.h"
#include "temporary_directory.h"

namespace espalier::io {
namespace {

namespace fs = std::filesystem;

void write_artifact(const fs::path& file) {
  Hdf5Writer writer(file);
  writer.write("tokens", at::arange(12, at::kInt).reshape({4, 3}));
  writer.write("blocks/0/mask", at::ones({5}, at::kByte));
  writer.attribute("/", "kind", std::string("text \xc3\xa9"));
  writer.attribute("/", "empty", std::string());
  writer.attribute("tokens", "vocabulary_size", int64_t{49152});
  writer.attribute("blocks/0", "sparsity", 0.5);
  writer.commit();
}

TEST(Hdf5, EveryDtypeIsReadAsItWasWritten) {
  const TemporaryDirectory directory;
  const auto dtypes = {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kLong,
                       at::kInt,   at::kShort,  at::kChar, at::kByte};
  const at::Tensor values = at::arange(0, 6, at::kFloat).reshape({2, 3}) * 0.75;
  {
    Hdf5Writer writer(directory / "a.h5");
    for (const auto dtype : dtypes) writer.write(c10::toString(dtype), values.to(dtype));
    writer.write("scalar", at::scalar_tensor(3.5, at::kDouble));
    writer.write("empty", at::empty({0, 4}, at::kFloat));
    writer.commit();
  }
  const Hdf5Reader reader(directory / "a.h5");
  for (const auto dtype : dtypes) {
    const at::Tensor read = reader.read(c10::toString(dtype), dtype);
    EXPECT_EQ(read.scalar_type(), dtype);
    EXPECT_TRUE(at::equal(read, values.to(dtype))) << c10::toString(dtype);
  }
  EXPECT_EQ(reader.read("scalar", at::kDouble).item<double>(), 3.5);
  EXPECT_EQ(reader.shape("empty"), (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(reader.read("empty", at::kFloat).numel(), 0);
}

TEST(Hdf5, GroupsAttributesAndPartsOfADataset) {
  const TemporaryDirectory directory;
  write_artifact(directory / "a.h5");
  const Hdf5Reader reader(directory / "a.h5");
  EXPECT_EQ(reader.children(), (std::vector<std::string>{"blocks", "tokens"}));
  EXPECT_EQ(reader.children("blocks/0"), std::vector<std::string>{"mask"});
  EXPECT_TRUE(reader.has("blocks/0/mask"));
  EXPECT_TRUE(reader.has("/tokens"));
  EXPECT_FALSE(reader.has("blocks/1/mask"));
  EXPECT_EQ(reader.text_attribute("/", "kind"), "text \xc3\xa9");
  EXPECT_EQ(reader.text_attribute("/", "empty"), "");
  EXPECT_EQ(reader.integer_attribute("tokens", "vocabulary_size"), 49152);
  EXPECT_EQ(reader.number_attribute("blocks/0", "sparsity"), 0.5);
  EXPECT_FALSE(reader.has_attribute("tokens", "kind"));
  EXPECT_TRUE(
      at::equal(reader.read("tokens", at::kInt, 1, 2), at::arange(3, 9, at::kInt).reshape({2, 3})));
  EXPECT_EQ(reader.read("tokens", at::kInt, 4, 0).size(0), 0);
}

TEST(Hdf5, TheSameCallsGiveTheSameBytes) {
  const TemporaryDirectory directory;
  write_artifact(directory / "a.h5");
  ::usleep(1'100'000);  // HDF5's time stamps count seconds
  write_artifact(directory / "b.h5");
  EXPECT_TRUE(read_file(directory / "a.h5") == read_file(directory / "b.h5"));
}

TEST(Hdf5, AWriterThatIsNotCommittedLeavesNothing) {
  const TemporaryDirectory directory;
  {
    Hdf5Writer writer(directory / "a.h5");
    writer.write("x", at::ones({3}));
  }
  EXPECT_TRUE(fs::is_empty(directory.path()));
}

TEST(Hdf5, WhatIsAskedWronglyIsNamed) {
  const TemporaryDirectory directory;
  write_artifact(directory / "a.h5");
  const Hdf5Reader reader(directory / "a.h5");
  const std::string file = (directory / "a.h5").string();
  expect_contains(message_of<UserError>([&] { reader.read("none", at::kInt); }),
                  {file, "\"none\"", "no such dataset"});
  expect_contains(message_of<UserError>([&] { reader.read("blocks", at::kInt); }),
                  {file, "\"blocks\"", "cannot be opened as a dataset"});
  expect_contains(message_of<UserError>([&] { reader.read("tokens", at::kLong); }),
                  {file, "\"tokens\"", "Long"});
  expect_contains(message_of<UserError>([&] { reader.read("tokens", at::kInt, 3, 2); }),
                  {file, "\"tokens\"", "[3, 5)", "it has 4"});
  expect_contains(message_of<UserError>([&] { reader.text_attribute("tokens", "kind"); }),
                  {file, "\"tokens\"", "\"kind\""});
  expect_contains(
      message_of<UserError>([&] { reader.text_attribute("tokens", "vocabulary_size"); }),
      {"not a text"});
  expect_contains(message_of<UserError>([&] { reader.integer_attribute("/", "kind"); }),
                  {"not an integer"});
}

TEST(HostileHdf5, AFileThatIsMissingCutOffOrOfAnotherKind) {
  const TemporaryDirectory directory;
  expect_contains(message_of<UserError>([&] { Hdf5Reader reader(directory / "none"); }),
                  {"no such file"});
  write_file(directory / "text", "hello");
  expect_contains(message_of<UserError>([&] { Hdf5Reader reader(directory / "text"); }),
                  {(directory / "text").string(), "not an HDF5 file"});
  write_artifact(directory / "a.h5");
  const std::string whole = read_file(directory / "a.h5");
  for (size_t length = 0; length < whole.size(); length += 97) {
    write_file(directory / "cut.h5", whole.substr(0, length));
    EXPECT_THROW(Hdf5Reader(directory / "cut.h5").read("tokens", at::kInt), UserError) << length;
  }
}

/// A file made with the library itself, in ways our writer does not.
void write_foreign(const fs::path& file, const std::function<void(hid_t)>& fill) {
  const hid_t id = H5Fcreate(file.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  fill(id);
  H5Fclose(id);
}

TEST(HostileHdf5, AHugeShapeWithNoDataBehindItTakesNoMemory) {
  const TemporaryDirectory directory;
  write_foreign(directory / "a.h5", [](hid_t file) {
    const hsize_t sizes[2] = {hsize_t{1} << 40, 1 << 10}, chunk[2] = {64, 64};
    const hid_t space = H5Screate_simple(2, sizes, nullptr);
    const hid_t chunked = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(chunked, 2, chunk);
    H5Dclose(H5Dcreate2(file, "x", H5T_STD_I32LE, space, H5P_DEFAULT, chunked, H5P_DEFAULT));
    H5Pclose(chunked);
    H5Sclose(space);
  });
  const Hdf5Reader reader(directory / "a.h5");
  expect_contains(message_of<UserError>([&] { reader.read("x", at::kInt); }),
                  {"\"x\"", "4503599627370496 bytes", "stores 0"});
  expect_contains(message_of<UserError>([&] { reader.read("x", at::kInt, 0, 1); }), {"stores 0"});
}

TEST(HostileHdf5, LinksAndDataOutsideTheFileAreNotFollowed) {
  const TemporaryDirectory directory;
  write_artifact(directory / "other.h5");
  write_file(directory / "secret", std::string(16, 's'));
  write_foreign(directory / "a.h5", [&](hid_t file) {
    H5Lcreate_external((directory / "other.h5").c_str(), "/tokens", file, "linked", H5P_DEFAULT,
                       H5P_DEFAULT);
    const hsize_t size = 16;
    const hid_t space = H5Screate_simple(1, &size, nullptr);
    const hid_t outside = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_external(outside, (directory / "secret").c_str(), 0, 16);
    H5Dclose(H5Dcreate2(file, "x", H5T_STD_U8LE, space, H5P_DEFAULT, outside, H5P_DEFAULT));
    H5Pclose(outside);
    H5Sclose(space);
  });
  const Hdf5Reader reader(directory / "a.h5");
  EXPECT_FALSE(reader.has("linked"));
  EXPECT_THROW(reader.read("linked", at::kInt), UserError);
  expect_contains(message_of<UserError>([&] { reader.read("x", at::kByte); }),
                  {"\"x\"", "other files"});
}

}  // namespace
}  // namespace espalier::io
