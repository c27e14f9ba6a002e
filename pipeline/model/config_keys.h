#pragma once
/// What config.json must say of a model's tensors as they are, where its root's file says
/// otherwise.

#include <filesystem>
#include <nlohmann/json.hpp>

#include "pipeline/io/checkpoint.h"

namespace espalier::model {

/// An object of keys: vocab_size, where rows were added to the embedding, and those of a
/// classification head that a stage gave to the model (config_of_head), so that `transformers`
/// loads the class that has it; and that an output embedding is no copy of the token embedding,
/// although the file said so (not every version compares them). Empty when there is nothing to say
/// or espalier cannot run the model (supported_architecture). Throws what config_of_head throws.
nlohmann::json config_of_tensors(const io::Checkpoint& checkpoint);

/// Sets the keys in DIRECTORY/config.json, when there are any.
void set_config_keys(const std::filesystem::path& directory, const nlohmann::json& keys);

}  // namespace espalier::model
