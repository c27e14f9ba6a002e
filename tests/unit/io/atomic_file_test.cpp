#include "pipeline/io/atomic_file.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <fstream>
#include <string>
#include <thread>

#include "pipeline/io/checksum.h"
#include "pipeline/io/hdf5.h"
#include "temporary_directory.h"

namespace espalier::io {
namespace {

namespace fs = std::filesystem;

/// Files of this process end at `bytes` while this lives: what a full disk does, for any user.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    previous_handler_ = std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &previous_);
    const rlimit limited{bytes, previous_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limited);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &previous_);
    std::signal(SIGXFSZ, previous_handler_);
  }

 private:
  rlimit previous_{};
  void (*previous_handler_)(int) = nullptr;
};

TEST(AtomicFile, TheTargetAppearsAtCommitOnly) {
  const TemporaryDirectory directory;
  const fs::path target = directory / "new/below/a.txt";
  AtomicFile file(target);
  file.write(std::string("one "));
  file.write(std::string("two"));
  EXPECT_FALSE(fs::exists(target));
  EXPECT_TRUE(is_temporary(file.temporary()));
  file.commit();
  EXPECT_EQ(read_file(target), "one two");
  EXPECT_EQ(std::distance(fs::directory_iterator(target.parent_path()), {}), 1);
}

TEST(AtomicFile, WhatIsNotCommittedLeavesTheOldFileAlone) {
  const TemporaryDirectory directory;
  write_file(directory / "a", "old");
  {
    AtomicFile file(directory / "a");
    file.write(std::string("new"));
  }
  EXPECT_EQ(read_file(directory / "a"), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(directory.path()), {}), 1);
}

TEST(AtomicFile, HasTheOrdinaryPermissions) {
  const TemporaryDirectory directory;
  write_file(directory / "a", "x");
  std::ofstream(directory / "b") << "x";
  EXPECT_EQ(fs::status(directory / "a").permissions(), fs::status(directory / "b").permissions());
}

TEST(AtomicFile, ANameOfTheGreatestLengthCanBeWritten) {
  const TemporaryDirectory directory;
  const std::string name(255, 'n');
  write_file(directory / name, "x");
  EXPECT_EQ(read_file(directory / name), "x");
}

TEST(AtomicFile, AFullDiskNamesPathReasonAndFreeBytesAndLeavesNothing) {
  const TemporaryDirectory directory;
  std::string message;
  {
    const FileSizeLimit limit(4096);
    message = message_of<EnvironmentError>(
        [&] { write_file(directory / "a", std::string(100000, 'x')); });
  }
  expect_contains(message, {(directory / "a").string(), "File too large", "bytes are free"});
  EXPECT_TRUE(fs::is_empty(directory.path()));
}

TEST(AtomicFile, ADirectoryThatCannotBeMadeIsNamed) {
  const TemporaryDirectory directory;
  write_file(directory / "file", "x");
  expect_contains(
      message_of<EnvironmentError>([&] { AtomicFile file(directory / "file/below/a"); }),
      {(directory / "file/below").string(), "Not a directory", "bytes are free"});
  expect_contains(message_of<EnvironmentError>([&] { require_space(directory / "file/below", 1); }),
                  {(directory / "file/below").string()});
}

TEST(AtomicFile, ATargetThatIsADirectoryIsRefusedAtCommit) {
  const TemporaryDirectory directory;
  fs::create_directories(directory / "a/b");
  expect_contains(message_of<EnvironmentError>([&] { write_file(directory / "a", "x"); }),
                  {(directory / "a").string()});
  EXPECT_EQ(std::distance(fs::directory_iterator(directory.path()), {}), 1);
}

TEST(RequireSpace, SaysHowMuchIsNeededAndHowMuchIsFree) {
  const TemporaryDirectory directory;
  require_space(directory.path(), 1);
  expect_contains(
      message_of<EnvironmentError>([&] { require_space(directory.path(), int64_t{1} << 60); }),
      {directory.path().string(), "1152921504606846976 bytes are needed"});
}

TEST(RequireSpace, LeavesNoDirectoryThatWasNotThere) {
  const TemporaryDirectory directory;
  fs::create_directories(directory / "there");
  require_space(directory / "there/new/below/", 1);
  require_space(directory / "other", 1);
  EXPECT_TRUE(fs::is_empty(directory / "there"));
  EXPECT_FALSE(fs::exists(directory / "other"));
  EXPECT_THROW(require_space(directory / "other", int64_t{1} << 60), EnvironmentError);
  EXPECT_FALSE(fs::exists(directory / "other"));
}

TEST(RequireSpace, StartsBelowOneNewDirectoryDoNotTakeItFromEachOther) {
  const TemporaryDirectory directory;
  const auto start_often = [&](const std::string& name) {
    for (int i = 0; i < 500; ++i)
      EXPECT_NO_THROW(require_space(directory / ("sweep/" + name), 1)) << name;
  };
  {
    const std::jthread other(start_often, "one");
    start_often("other");
  }
  EXPECT_FALSE(fs::exists(directory / "sweep/one"));
}

TEST(RemoveLeftovers, RemovesTemporaryFilesOnly) {
  const TemporaryDirectory directory;
  write_file(directory / "keep/.hidden", "x");
  write_file(directory / "keep/.a.h5.espalier-tmp-Ab12Cd", "x");
  write_file(directory / "keep/a.espalier-tmp-notes", "x");
  remove_leftovers(directory.path());
  EXPECT_FALSE(fs::exists(directory / "keep/.a.h5.espalier-tmp-Ab12Cd"));
  EXPECT_EQ(std::distance(fs::directory_iterator(directory / "keep"), {}), 2);
  remove_leftovers(directory / "none");
}

TEST(ReadFile, RefusesWhatIsMissingTooLongOrNoFile) {
  const TemporaryDirectory directory;
  write_file(directory / "a", "12345");
  EXPECT_EQ(read_file(directory / "a", 5), "12345");
  expect_contains(message_of<UserError>([&] { read_file(directory / "a", 4); }),
                  {(directory / "a").string(), "5 bytes", "4"});
  expect_contains(message_of<UserError>([&] { read_file(directory / "b"); }), {"No such file"});
  expect_contains(message_of<UserError>([&] { read_file(directory.path()); }),
                  {"not a regular file"});
  ASSERT_EQ(::mkfifo((directory / "pipe").c_str(), 0600), 0);
  expect_contains(message_of<UserError>([&] { read_file(directory / "pipe"); }),
                  {"not a regular file"});
}

TEST(Hdf5Writer, AFullDiskIsAnErrorOfTheEnvironmentAndLeavesNothing) {
  const TemporaryDirectory directory;
  std::string message;
  {
    const FileSizeLimit limit(4096);
    message = message_of<EnvironmentError>([&] {
      Hdf5Writer writer(directory / "a.h5");
      writer.write("x", at::zeros({100000}, at::kFloat));
      writer.commit();
    });
  }
  expect_contains(message, {(directory / "a.h5").string(), "bytes are free"});
  EXPECT_TRUE(fs::is_empty(directory.path()));
  // The library is still usable.
  Hdf5Writer writer(directory / "b.h5");
  writer.write("x", at::zeros({10}, at::kFloat));
  writer.commit();
  EXPECT_TRUE(fs::exists(directory / "b.h5"));
}

// The known XXH3_128bits of nothing.
TEST(Checksum, IsXxh3Of128Bits) {
  EXPECT_EQ(checksum(std::string()), "99aa06d3014798d86001c324468d497f");
  const TemporaryDirectory directory;
  const std::string text(3 << 20, 'e');
  write_file(directory / "a", text);
  EXPECT_EQ(file_checksum(directory / "a"), checksum(text));
  expect_contains(message_of<UserError>([&] { file_checksum(directory / "b"); }),
                  {(directory / "b").string(), "No such file"});
}

TEST(Checksum, OfATreeKnowsNamesAndContents) {
  const TemporaryDirectory directory;
  write_file(directory / "one/a", "x");
  write_file(directory / "one/b/c", "y");
  write_file(directory / "two/b/c", "y");
  write_file(directory / "two/a", "x");
  EXPECT_EQ(tree_checksum(directory / "one"), tree_checksum(directory / "two"));
  write_file(directory / "two/a", "z");
  EXPECT_NE(tree_checksum(directory / "one"), tree_checksum(directory / "two"));
  fs::rename(directory / "one/a", directory / "one/d");
  EXPECT_NE(tree_checksum(directory / "one"), tree_checksum(directory / "two"));
}

}  // namespace
}  // namespace espalier::io
