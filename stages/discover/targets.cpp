#include "stages/discover/targets.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/layer_glob.h"

namespace espalier::discover {
std::vector<TargetMatrix> target_matrices(const model::Architecture& architecture,
                                          const std::vector<std::string>& globs) {
  std::vector<TargetMatrix> targets;
  std::vector<bool> used(globs.size(), false);
  for (int64_t block = 0; block < architecture.blocks; ++block)
    for (const model::Linear& layer : architecture.linears) {
      bool wanted = false;
      for (size_t i = 0; i < globs.size(); ++i) {
        if (!model::glob_matches(globs[i], architecture, block, layer)) continue;
        wanted = used[i] = true;
      }
      if (!wanted) continue;
      const model::Linear sized = architecture.in_block(block, layer);
      targets.push_back(
          {architecture.weight_name(block, layer), sized.out, sized.in, block, sized});
    }
  const auto unused = std::find(used.begin(), used.end(), false);
  if (unused == used.end()) return targets;
  std::vector<std::string> names;
  for (const model::Linear& layer : architecture.linears) names.push_back(layer.name);
  throw UserError(
      fmt::format("discover.targets: '{}' matches no linear layer of this {} model; a block has {}",
                  globs[unused - used.begin()], architecture.model_type, fmt::join(names, ", ")));
}

}  // namespace espalier::discover
