#pragma once
/// OmegaConf's merge of one tree into another, and reading and writing one key of a tree.

#include <string>
#include <vector>

#include "pipeline/config/node.h"
#include "pipeline/config/override.h"

namespace espalier::config {

/// Merges `source` into `target`, both mappings: mappings merge, lists and scalars replace, `???`
/// replaces nothing; the place of a key stays. A mapping against a list is a UserError.
void merge(const NodePtr& target, const Node& source);
/// Wraps a file's content in its package "a.b" and merges it into the root.
void merge_package(const NodePtr& root, const NodePtr& content, const std::string& package);
/// Applies an override that is no group choice: change, add or remove one key.
void apply_override(const NodePtr& root, const Override& override);
/// Every key of the tree as "a.b.c", for "did you mean".
std::vector<std::string> all_paths(const Node& root);

}  // namespace espalier::config
