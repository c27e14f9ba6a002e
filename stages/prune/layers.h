#pragma once
/// Which linear layers are pruned, and each one's pattern.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/pattern.h"

namespace espalier::prune {

/// One entry of prune.overrides.
struct Override {
  std::string match;
  std::optional<Pattern> pattern;  ///< absent: skip
};

/// A glob matches a layer's whole name in its block ("model.layers.3.mlp.down_proj"), its name
/// inside the block ("mlp.down_proj") or that name's last part ("down_proj").
struct LayerChoice {
  Pattern pattern;                            ///< of layers that no override names
  std::vector<std::string> include, exclude;  ///< empty include: every linear layer
  std::vector<Override> overrides;            ///< among those chosen; the first match wins
};

/// Reads pattern, sparsity, include, exclude and overrides. Throws UserError placed at the key.
LayerChoice read_layer_choice(const config::Section& section);

/// One linear layer of a block as it is to be pruned.
struct PlannedLayer {
  const model::Linear* linear;
  Pattern pattern;
  bool overridden = false;  ///< an allocation over blocks leaves it alone
};

/// The layers of `block` that are pruned, in the order of Role.
std::vector<PlannedLayer> planned_layers(const LayerChoice& choice,
                                         const model::Architecture& architecture, int64_t block);

/// Throws UserError for a glob that matches no layer of the model, and for a pattern that does not
/// divide a chosen layer's inputs.
void require_layers(const LayerChoice& choice, const model::Architecture& architecture);

}  // namespace espalier::prune
