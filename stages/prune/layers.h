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
  model::Linear linear;  ///< with its sizes in the block
  Pattern pattern;
  bool overridden = false;  ///< an allocation over blocks leaves it alone
};

/// The layers of `block` that are pruned, in the order of Role.
std::vector<PlannedLayer> planned_layers(const LayerChoice& choice,
                                         const model::Architecture& architecture, int64_t block);

/// Whether a layer outside of the blocks is chosen, by its weight's name: the globs are held
/// against the layer's whole name ("bert.pooler.dense") and its last two parts ("pooler.dense").
bool chooses(const LayerChoice& choice, const std::string& weight);

/// Throws UserError for a glob that matches no layer of the model (`outside`: the weight of one
/// that stands outside of the blocks), and for a pattern that does not divide a chosen layer's
/// inputs.
void require_layers(const LayerChoice& choice, const model::Architecture& architecture,
                    const std::optional<std::string>& outside = std::nullopt);

}  // namespace espalier::prune
