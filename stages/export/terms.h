#pragma once
/// What stands beside a model's matrices, as files for other programs.

#include <filesystem>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"

namespace espalier::exporting {

struct Terms {
  std::vector<std::string> files;  ///< relative to the export
  std::string sentence;            ///< what was written, for a person; empty when nothing was
};

inline constexpr const char* kAdapterFolder = "adapter";

/// Writes the terms of `model` (pipeline/model/added_terms.h) into `directory`/adapter: where all
/// are low-rank products of matrices that are stored as they are, as adapter_config.json and
/// adapter_model.safetensors that the peft library loads on the dense checkpoint in `directory`
/// (scales inside lora_B, lora_alpha = r); otherwise as terms.safetensors under espalier's names.
/// Every rank calls it, one with `write`.
Terms write_terms(const io::Checkpoint& model, const std::filesystem::path& directory, bool write);

}  // namespace espalier::exporting
