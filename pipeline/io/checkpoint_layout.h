#pragma once
/// The file names of a model directory.

#include <filesystem>
#include <string>
#include <vector>

namespace espalier::io {

inline constexpr const char* kConfigFile = "config.json";
inline constexpr const char* kDerivedFile = "derived.json";
inline constexpr const char* kWeightsFile = "model.safetensors";
inline constexpr const char* kIndexFile = "model.safetensors.index.json";
inline constexpr size_t kMaxConfigBytes = size_t{16} << 20;
inline constexpr size_t kMaxIndexBytes = size_t{100} << 20;

/// The shard `index` (from 0) of `count`: model.safetensors, or model-00001-of-00003.safetensors.
std::string shard_name(size_t index, size_t count);

/// Whether a name is one that a dense checkpoint's shards have (any count).
bool is_shard_name(const std::string& name);

/// Names of the files of `root` that belong beside the weights of an export: tokenizer, vocabulary,
/// generation settings, chat template. Sorted.
std::vector<std::string> companion_files(const std::filesystem::path& root);

/// Names of all *.safetensors files in the directory, sorted.
std::vector<std::string> safetensors_files(const std::filesystem::path& directory);

}  // namespace espalier::io
