/// Qwen3: LLaMA's decoder with an rms norm on every head's queries and keys.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_qwen3(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a = read_gated_decoder(config, "silu", 128);
  a.query_norm = {"self_attn.q_norm.weight", ""};
  a.key_norm = {"self_attn.k_norm.weight", ""};
  read_window_of_all_blocks(a, json, checkpoint);
  return a;
}

const ArchitectureRegistration qwen3{"qwen3", read_qwen3};

}  // namespace
}  // namespace espalier::model
