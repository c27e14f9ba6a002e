#include "pipeline/model/parameter_names.h"

#include <algorithm>

#include "pipeline/model/stored_layers.h"

namespace espalier::model {
namespace {

/// In the families that are read here every attention's own "bias" is its causal mask: the biases
/// of layers stand under the layers' names.
bool is_buffer(const std::string& name) {
  const auto ends = [&](const char* end) { return name.ends_with(end); };
  return ends(".attn.bias") || ends(".attention.bias") || ends(".masked_bias") ||
         ends(".rotary_emb.inv_freq") || ends(".added.scale");
}

}  // namespace

std::vector<std::string> parameter_names(const io::Checkpoint& checkpoint, const Architecture& a) {
  const std::vector<std::string> copies = copies_of_tied_head(a, checkpoint);
  std::vector<std::string> names = checkpoint.names();
  std::erase_if(names, [&](const std::string& name) {
    return !at::isFloatingType(checkpoint.info(name).dtype) || is_buffer(name) ||
           std::find(copies.begin(), copies.end(), name) != copies.end();
  });
  return names;
}

}  // namespace espalier::model
