#include "pipeline/model/layer_glob.h"

#include <fnmatch.h>

namespace espalier::model {

bool glob_matches(const std::string& glob, const Architecture& architecture, int64_t block,
                  const Linear& layer) {
  const std::string last = layer.name.substr(layer.name.rfind('.') + 1);
  for (const std::string& name : {last, layer.name, architecture.tensor_name(block, layer.name)})
    if (fnmatch(glob.c_str(), name.c_str(), 0) == 0) return true;
  return false;
}

}  // namespace espalier::model
