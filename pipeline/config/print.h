#pragma once
/// A tree as YAML (parse-equal to OmegaConf.to_yaml) and as JSON.

#include <string>

#include "pipeline/config/node.h"

namespace espalier::config {

/// Block style, keys in order; texts that YAML 1.1 would read as something else are quoted.
std::string to_yaml(const Node& node);
/// Keys in order, or sorted for a canonical text. NaN and infinities are written NaN, Infinity,
/// -Infinity, as Python's json does; `???` is "???".
std::string to_json(const Node& node, bool sorted_keys);

}  // namespace espalier::config
