/// Gemma: LLaMA's decoder with norms that store their weight minus 1, token embeddings times
/// sqrt(hidden), a tanh GELU gate, heads of their own size and a tied head.

#include <cmath>

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_gemma(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a = read_gated_decoder(config, "gelu_pytorch_tanh", 256, true);
  // The first releases say "gelu" and mean the approximation.
  if (a.activation == Activation::gelu) a.activation = Activation::gelu_tanh;
  if (config.flag_or("use_bidirectional_attention", false))
    config.fail("use_bidirectional_attention: true is not supported");
  a.norm_from_one = true;
  a.embedding_scale = std::sqrt(static_cast<double>(a.hidden));
  return a;
}

const ArchitectureRegistration gemma{"gemma", read_gemma};

}  // namespace
}  // namespace espalier::model
