// Runs the tests of one layer with a directory of their own as testing::TempDir(): ctest runs tests
// side by side, and those that write the same names must not meet.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  std::string directory = testing::TempDir() + "espalier-test-XXXXXX";
  if (!mkdtemp(directory.data())) {
    std::perror(directory.c_str());
    return 1;
  }
  setenv("TEST_TMPDIR", directory.c_str(), 1);
  const int status = RUN_ALL_TESTS();
  std::error_code kept;
  std::filesystem::remove_all(directory, kept);
  return status;
}
