#pragma once
/// Which tensors of a model a method trains: matrices that are adapted, and other tensors (sites)
/// that are trained as a whole.

#include <functional>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/block.h"
#include "stages/retrain/adapter.h"

namespace espalier::retrain {

struct Matrix {
  int64_t block = 0;
  model::Linear linear;  ///< with its sizes in the block
};

/// A site and where its tensor stands in the model in memory: one of the three is set.
struct PlacedSite {
  Site site;
  std::function<at::Tensor&(model::BlockWeights&)> in_block;
  std::function<at::Tensor&(model::Ends&)> in_ends;
  std::function<at::Tensor&(model::RelativeEmbeddings&)> in_relative;
};

struct Selection {
  std::vector<Matrix> matrices;   ///< by block, in the order of the architecture
  std::vector<PlacedSite> sites;  ///< by block; what stands before and behind the blocks last
};

/// Every tensor that is no matrix of a linear layer. A tied output embedding is no site of its own.
std::vector<PlacedSite> sites_of(const io::Checkpoint& checkpoint,
                                 const model::Architecture& architecture);

/// What `targets` name and `method` trains; all that it can train when `targets` is empty. A glob
/// matches the last part of a tensor's name without its ".weight" or ".bias" ("q_proj"), the name
/// inside the block ("self_attn.*"), or the whole name ("model.layers.2[0-9].*", "lm_head.weight").
/// `head` are the tensors of a classification head, which is trained whoever names it; the output
/// embedding and its bias then take no part and are no sites.
/// Throws UserError listing the layers there are when one of `targets` matches nothing the method
/// trains, or when nothing is left to train.
Selection select(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
                 const AdapterMethod& method, const std::vector<std::string>& targets,
                 const std::vector<std::string>& head = {});

}  // namespace espalier::retrain
