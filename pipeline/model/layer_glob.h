#pragma once
/// How a configuration names linear layers: by globs (fnmatch).

#include <string>

#include "pipeline/model/architecture.h"

namespace espalier::model {

/// Whether the glob matches a layer's last part ("q_proj"), its name in the block
/// ("self_attn.q_proj") or its whole name ("model.layers.3.self_attn.q_proj").
bool glob_matches(const std::string& glob, const Architecture& architecture, int64_t block,
                  const Linear& layer);

}  // namespace espalier::model
