/// RoBERTa: BERT's encoder whose learned positions begin behind the padding token's row and count
/// only tokens that are not padding.

#include <fmt/format.h>

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_roberta(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a = read_encoder(config, checkpoint, encoder_root(checkpoint, "roberta."));
  a.padding_token = config.integer_or("pad_token_id", 1, 0, kVocabularyLimit);
  a.position_offset = *a.padding_token + 1;
  a.max_positions =
      config.integer("max_position_embeddings", a.position_offset + 1, kPositionLimit) -
      a.position_offset;
  return a;
}

const ArchitectureRegistration roberta{"roberta", read_roberta};

}  // namespace
}  // namespace espalier::model
