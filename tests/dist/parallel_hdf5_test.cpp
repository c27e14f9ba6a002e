#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/hdf5_parallel.h"

namespace espalier::io {
namespace {

namespace fs = std::filesystem;

/// A directory that all ranks share, removed by the first.
class SharedDirectory {
 public:
  SharedDirectory() {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
    char name[256] = "";
    if (rank_ == 0) {
      const std::string pattern = (fs::temp_directory_path() / "espalier-dist-XXXXXX").string();
      pattern.copy(name, sizeof name - 1);
      EXPECT_NE(::mkdtemp(name), nullptr);
    }
    MPI_Bcast(name, sizeof name, MPI_CHAR, 0, MPI_COMM_WORLD);
    path_ = name;
  }
  ~SharedDirectory() {
    MPI_Barrier(MPI_COMM_WORLD);
    std::error_code error;
    if (rank_ == 0) fs::remove_all(path_, error);
  }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  int rank() const { return rank_; }
  int size() const { return size_; }

 private:
  fs::path path_;
  int rank_ = 0, size_ = 1;
};

const at::Tensor& whole() {
  static const at::Tensor values = at::arange(0, 7 * 5, at::kFloat).reshape({7, 5});
  return values;
}

void write_share(const fs::path& file, MPI_Comm group) {
  int rank = 0, size = 1;
  MPI_Comm_rank(group, &rank);
  MPI_Comm_size(group, &size);
  const int64_t each = (7 + size - 1) / size;
  const int64_t first = std::min<int64_t>(7, rank * each);
  const int64_t count = std::min<int64_t>(each, 7 - first);
  ParallelHdf5Writer writer(file, group);
  writer.write_rows("blocks/0/weight", whole().narrow(0, first, count), first, 7);
  writer.write_rows("halves", whole().narrow(0, first, count).to(at::kBFloat16), first, 7);
  writer.attribute("/", "kind", std::string("masks"));
  writer.attribute("halves", "step", int64_t{3});
  writer.attribute("halves", "scale", 0.25);
  writer.commit();
}

TEST(ParallelHdf5, RanksWriteTheirOwnRowsOfOneFile) {
  const SharedDirectory directory;
  write_share(directory / "a.h5", MPI_COMM_WORLD);
  MPI_Barrier(MPI_COMM_WORLD);
  const Hdf5Reader reader(directory / "a.h5");
  EXPECT_TRUE(at::equal(reader.read("blocks/0/weight", at::kFloat), whole()));
  EXPECT_TRUE(at::equal(reader.read("halves", at::kBFloat16), whole().to(at::kBFloat16)));
  EXPECT_EQ(reader.text_attribute("/", "kind"), "masks");
  EXPECT_EQ(reader.number_attribute("halves", "scale"), 0.25);
}

TEST(ParallelHdf5, TheBytesAreThoseThatOneRankWrites) {
  const SharedDirectory directory;
  write_share(directory / "all.h5", MPI_COMM_WORLD);
  if (directory.rank() == 0) {
    write_share(directory / "one.h5", MPI_COMM_SELF);
    EXPECT_TRUE(read_file(directory / "all.h5") == read_file(directory / "one.h5"));
  }
}

TEST(ParallelHdf5, RowsThatDoNotCoverTheDatasetOnceAreADefectOnEveryRank) {
  const SharedDirectory directory;
  ParallelHdf5Writer writer(directory / "a.h5", MPI_COMM_WORLD);
  try {
    writer.write_rows("x", whole(), 0, 7 * directory.size() + 1);
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), kExitDefect);
  }
}

TEST(ParallelHdf5, ADirectoryThatCannotBeMadeIsAnErrorOnEveryRank) {
  const SharedDirectory directory;
  if (directory.rank() == 0) write_file(directory / "file", "x");
  MPI_Barrier(MPI_COMM_WORLD);
  try {
    ParallelHdf5Writer writer(directory / "file/a.h5", MPI_COMM_WORLD);
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), kExitEnvironment);
    EXPECT_NE(std::string(error.what()).find("Not a directory"), std::string::npos);
  }
}

TEST(ParallelHdf5, WhatIsNotCommittedLeavesNothing) {
  const SharedDirectory directory;
  {
    ParallelHdf5Writer writer(directory / "out/a.h5", MPI_COMM_WORLD);
    writer.attribute("/", "kind", std::string("masks"));
  }
  MPI_Barrier(MPI_COMM_WORLD);
  EXPECT_TRUE(fs::is_empty(directory / "out"));
}

}  // namespace
}  // namespace espalier::io
