#pragma once
/// One YAML file as a tree with the line of every value, read as OmegaConf's loader reads it.

#include <filesystem>
#include <optional>
#include <string>

#include "pipeline/config/node.h"

namespace espalier::config {

struct YamlFile {
  NodePtr root;                        ///< a mapping (an empty file is an empty mapping) or a list
  std::optional<std::string> package;  ///< of the header line `# @package NAME`
};

/// Files are hostile: at most 4 MiB, 64 levels, 200000 values after aliases are expanded.
/// Throws UserError "FILE:LINE: ..." for what YAML or OmegaConf refuse: bad syntax, duplicate keys,
/// unknown tags, several documents, an interpolation that does not parse.
YamlFile read_yaml_file(const std::filesystem::path& file);
/// The same from text; `name` is used in messages and origins.
YamlFile read_yaml_text(const std::string& text, const std::string& name);

}  // namespace espalier::config
