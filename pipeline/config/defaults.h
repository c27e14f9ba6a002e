#pragma once
/// The defaults tree: which files make up a configuration, in which order, in which package.

#include <string>
#include <vector>

#include "pipeline/config/override.h"
#include "pipeline/config/repository.h"

namespace espalier::config {

/// One file of the final list; merged in order.
struct DefaultsRow {
  std::string config, package, parent;
  bool is_self = false;  ///< the file has a defaults list, this is its _self_
  const ConfigFile* file = nullptr;
};

/// The files of `primary` with the group overrides among `overrides` applied. Throws UserError for
/// a missing file, an override that matches nothing, a group that appears twice, an endless
/// nesting.
std::vector<DefaultsRow> expand_defaults(Repository& repository, const std::string& primary,
                                         const std::vector<Override>& overrides);

/// True for an override that chooses from a group rather than setting a key.
/// Throws UserError for group@package with an unknown group.
bool is_group_override(const Repository& repository, const Override& override);

}  // namespace espalier::config
