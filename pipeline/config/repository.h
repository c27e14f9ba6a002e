#pragma once
/// The directory of configuration files: groups are folders, choices are files.

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/config/node.h"

namespace espalier::config {

/// One element of a defaults list.
struct DefaultsEntry {
  enum class Kind { self, config, group };
  Kind kind = Kind::config;
  std::string name = {};  ///< of a config: its path; of a group: the group, both as written
  bool absolute = false;  ///< written with a leading '/'
  std::vector<std::string> choices = {};  ///< of a group
  bool is_list = false, is_null = false, is_missing = false;
  std::optional<std::string> package = {};  ///< after '@'
  bool optional = false, override = false;
  Origin origin = {};
};

/// A file split into its defaults list and the rest.
struct ConfigFile {
  NodePtr content;
  std::optional<std::string> package;  ///< of the header
  std::vector<DefaultsEntry> defaults;
};

class Repository {
 public:
  explicit Repository(std::filesystem::path directory);

  /// The file "group/name" (".yaml" is added); nullptr when there is none. Cached.
  const ConfigFile* load(const std::string& path);
  bool has_group(const std::string& group) const;
  /// The choices of a group, sorted; of "" the primary configurations.
  std::vector<std::string> choices(const std::string& group) const;
  /// Every folder that holds configurations, sorted: "prune", "model/rope".
  std::vector<std::string> groups() const;
  const std::filesystem::path& directory() const { return directory_; }

 private:
  std::filesystem::path directory_;
  std::map<std::string, ConfigFile> files_;
};

}  // namespace espalier::config
