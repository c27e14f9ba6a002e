/// adapters.h5 of a retrain stage.

#include <ATen/ATen.h>

#include "pipeline/inspect/inspection.h"
#include "pipeline/io/json.h"
#include "pipeline/io/safetensors_dtype.h"
#include "pipeline/train/adapters_h5.h"

namespace espalier::inspect {
namespace {

using json = nlohmann::ordered_json;

json describe(const std::filesystem::path& file) {
  const train::AdaptersFile content = train::read_adapters_h5(file);
  json tensors = json::array();
  int64_t trained = 0, head = 0;
  for (const auto& [path, value] : content.tensors) {
    const bool frozen = path.starts_with(train::kFrozenGroup);
    const bool of_head = path.starts_with(train::kHeadGroup);
    (of_head ? head : trained) += frozen ? 0 : value.numel();
    tensors.push_back({{"name", path.substr(1)},
                       {"shape", value.sizes().vec()},
                       {"dtype", std::string(io::name_of(value.scalar_type()))},
                       {"trained", !frozen}});
  }
  return {{"method", content.identity.method},
          {"settings", io::parse_json(content.identity.settings, file.string() + ": settings")},
          {"base_checksum", content.identity.base_checksum},
          {"matrices", train::matrices_of(content).size()},
          {"parameters", trained},
          {"parameters_of_head", head},
          {"tensors", std::move(tensors)}};
}

const FileKind registration{"espalier.adapters", describe};

}  // namespace
}  // namespace espalier::inspect
