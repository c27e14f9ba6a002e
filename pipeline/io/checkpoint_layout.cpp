#include "pipeline/io/checkpoint_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <regex>
#include <string_view>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

/// The regular files (links followed: hubs store models as links) whose name `wanted` accepts.
template <typename Wanted>
std::vector<std::string> files_of(const std::filesystem::path& directory, Wanted wanted) {
  std::error_code error;
  std::vector<std::string> names;
  std::filesystem::directory_iterator entry(directory, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    std::error_code of_entry;
    if (wanted(name) && entry->is_regular_file(of_entry)) names.push_back(name);
  }
  if (error) {
    throw UserError(
        fmt::format("{}: the directory cannot be read: {}", directory.string(), error.message()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool is_companion(const std::string& name) {
  static constexpr std::array<std::string_view, 9> names = {
      "vocab.json",          "vocab.txt",          "merges.txt",
      "added_tokens.json",   "chat_template.json", "special_tokens_map.json",
      "chat_template.jinja", "spiece.model",       "generation_config.json"};
  const std::string_view view = name;
  return std::find(names.begin(), names.end(), view) != names.end() ||
         (view.starts_with("tokenizer") && view.ends_with(".json")) || view.ends_with(".model") ||
         view.ends_with(".tiktoken");
}

}  // namespace

std::string shard_name(size_t index, size_t count) {
  if (count == 1) return kWeightsFile;
  return fmt::format("model-{:05}-of-{:05}.safetensors", index + 1, count);
}

bool is_shard_name(const std::string& name) {
  static const std::regex pattern("model-[0-9]+-of-[0-9]+\\.safetensors");
  return std::regex_match(name, pattern);
}

std::vector<std::string> companion_files(const std::filesystem::path& root) {
  return files_of(root, is_companion);
}

std::vector<std::string> safetensors_files(const std::filesystem::path& directory) {
  return files_of(directory, [](std::string_view name) { return name.ends_with(".safetensors"); });
}

}  // namespace espalier::io
