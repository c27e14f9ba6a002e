#pragma once
/// What stands beside a model's matrices, as files for other programs.

#include <filesystem>
#include <string>

#include "pipeline/io/checkpoint.h"

namespace espalier::exporting {

/// Writes the terms of `model` (pipeline/model/added_terms.h) into `directory`: where all are
/// low-rank products, as adapter_config.json and adapter_model.safetensors that the peft library
/// loads on the dense checkpoint next to it (scales inside lora_B, lora_alpha = r); otherwise as
/// terms.safetensors under espalier's names. Returns the sentence that says so; empty, and nothing
/// written, when there are no terms.
std::string write_terms(const io::Checkpoint& model, const std::filesystem::path& directory);

}  // namespace espalier::exporting
