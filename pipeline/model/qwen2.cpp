/// Qwen2 and 2.5: LLaMA's decoder with biases on q, k and v.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_qwen2(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a = read_gated_decoder(config);
  for (Linear& linear : a.linears)
    linear.bias = linear.role == kQuery || linear.role == kKey || linear.role == kValue;
  read_window_of_all_blocks(a, json, checkpoint);
  return a;
}

const ArchitectureRegistration qwen2{"qwen2", read_qwen2};

}  // namespace
}  // namespace espalier::model
