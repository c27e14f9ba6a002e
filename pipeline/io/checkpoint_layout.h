#pragma once
/// The file names of a model directory.

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace espalier::io {

inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kDerivedFile = "derived.json";
inline constexpr const char* kWeightsFile = "model.safetensors";
inline constexpr const char* kIndexFile = "model.safetensors.index.json";
inline constexpr size_t kMaxConfigBytes = size_t{16} << 20;
inline constexpr size_t kMaxIndexBytes = size_t{100} << 20;

/// What names the weights: transformers', what the diffusers library writes, and both packed.
inline constexpr const char* kPackedPrefix = "packed_";
inline constexpr const char* kStems[] = {"model", "diffusion_pytorch_model", "packed_model",
                                         "packed_diffusion_pytorch_model"};

/// The shard `index` (from 0) of `count`: model.safetensors, or model-00001-of-00003.safetensors.
std::string shard_name(size_t index, size_t count, const std::string& stem = kStems[0]);

/// Whether a name is one that shard_name gives (any count).
bool is_weights_name(const std::string& name);

/// A model directory, or a single file of tensors (*.safetensors).
bool is_model_path(const std::filesystem::path& path);

/// Subdirectories, sorted.
std::vector<std::string> subdirectories(const std::filesystem::path& directory);

/// A file that speaks for a derived model (heads.json, labels.json): that of the nearest directory
/// of Checkpoint::chain() that has one.
std::optional<std::filesystem::path> nearest_file(const std::vector<std::filesystem::path>& chain,
                                                  const std::string& name);

/// Names of the files of `root` that belong beside the weights of an export: tokenizer, vocabulary,
/// generation settings, chat template. Sorted.
std::vector<std::string> companion_files(const std::filesystem::path& root);

/// What tells an export's files of weights from another program's, in their metadata.
inline constexpr const char* kWriterKey = "written_by";
inline constexpr const char* kWriter = "espalier";
/// The metadata of every file of weights that an export writes.
inline std::map<std::string, std::string> export_metadata() {
  return {{"format", "pt"}, {kWriterKey, kWriter}};
}

/// Names of all *.safetensors files in the directory, sorted.
std::vector<std::string> safetensors_files(const std::filesystem::path& directory);

}  // namespace espalier::io
