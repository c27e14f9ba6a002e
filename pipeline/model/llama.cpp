/// LLaMA 1-3, Mistral, SmolLM2: rms norms before, gated feed-forward, rotary positions,
/// grouped-query attention, tied or untied head.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_llama(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a = read_gated_decoder(config);
  // LLaMA's configurations may carry the key; only Mistral's attention uses it.
  if (config.text_or("model_type", "") == "mistral")
    a.sliding_window = read_window(json, checkpoint);
  return a;
}

const ArchitectureRegistration llama{"llama", read_llama};
const ArchitectureRegistration mistral{"mistral", read_llama};

}  // namespace
}  // namespace espalier::model
