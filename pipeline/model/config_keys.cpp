#include "pipeline/model/config_keys.h"

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/json.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/sequence_head.h"

namespace espalier::model {

nlohmann::json config_of_tensors(const io::Checkpoint& checkpoint) {
  nlohmann::json keys = nlohmann::json::object();
  const std::optional<Architecture> architecture = supported_architecture(checkpoint);
  if (!architecture) return keys;
  if (checkpoint.config().at("vocab_size") != architecture->vocabulary)
    keys["vocab_size"] = architecture->vocabulary;
  if (const auto of_head = config_of_head(checkpoint, *architecture)) keys.update(*of_head);
  if (architecture->tied_head && !architecture->head.empty() &&
      architecture->head != architecture->token_embedding)
    keys["tie_word_embeddings"] = false;
  return keys;
}

void set_config_keys(const std::filesystem::path& directory, const nlohmann::json& keys) {
  if (keys.empty()) return;
  const std::filesystem::path file = directory / io::kConfigFile;
  nlohmann::json config = io::parse_json(io::read_file(file), file.string());
  config.update(keys);
  io::write_file(file, config.dump(2) + "\n");
}

}  // namespace espalier::model
