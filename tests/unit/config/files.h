#pragma once
/// A directory of configuration files that lives as long as the test.

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"

namespace espalier::config {

class Files {
 public:
  explicit Files(const std::vector<std::pair<std::string, std::string>>& files) {
    std::string pattern = (std::filesystem::temp_directory_path() / "config_test_XXXXXX").string();
    if (!mkdtemp(pattern.data())) throw EnvironmentError("no temporary directory");
    directory = pattern;
    for (const auto& [name, text] : files) {
      std::filesystem::create_directories((directory / name).parent_path());
      std::ofstream(directory / name) << text;
    }
  }
  ~Files() { std::filesystem::remove_all(directory); }
  Files(const Files&) = delete;

  Composition compose(const std::vector<std::string>& overrides = {}) const {
    return config::compose({directory, "default", overrides});
  }
  std::string file(const std::string& name) const { return (directory / name).string(); }

  std::filesystem::path directory;
};

/// The message of the UserError that `action` throws, "" when it throws none.
template <typename Action>
std::string refusal(const Action& action) {
  try {
    action();
  } catch (const UserError& error) {
    return error.what();
  }
  return "";
}

}  // namespace espalier::config
