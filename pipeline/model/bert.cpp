/// BERT (MiniLM): layer norms after the addition, learned positions, token types, full attention.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_bert(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a = read_encoder(config, checkpoint, encoder_root(checkpoint, "bert."));
  a.max_positions = config.integer("max_position_embeddings", 1, kPositionLimit);
  return a;
}

const ArchitectureRegistration bert{"bert", read_bert};

}  // namespace
}  // namespace espalier::model
