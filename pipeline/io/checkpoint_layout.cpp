#include "pipeline/io/checkpoint_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <regex>
#include <string_view>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

/// Names of the entries that `wanted` accepts, sorted.
template <typename Wanted>
std::vector<std::string> entries_of(const std::filesystem::path& directory, Wanted wanted) {
  std::error_code error;
  std::vector<std::string> names;
  std::filesystem::directory_iterator entry(directory, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    if (wanted(*entry)) names.push_back(entry->path().filename().string());
  }
  if (error) {
    throw UserError(
        fmt::format("{}: the directory cannot be read: {}", directory.string(), error.message()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// The regular files (links followed: hubs store models as links) whose name `wanted` accepts.
template <typename Wanted>
std::vector<std::string> files_of(const std::filesystem::path& directory, Wanted wanted) {
  return entries_of(directory, [&](const auto& entry) {
    std::error_code error;
    return wanted(entry.path().filename().string()) && entry.is_regular_file(error);
  });
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

std::string shard_name(size_t index, size_t count, const std::string& stem) {
  if (count == 1) return stem + ".safetensors";
  return fmt::format("{}-{:05}-of-{:05}.safetensors", stem, index + 1, count);
}

bool is_model_path(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::is_directory(path, error) ||
         (path.extension() == ".safetensors" && std::filesystem::is_regular_file(path, error));
}

std::vector<std::string> subdirectories(const std::filesystem::path& directory) {
  return entries_of(directory, [](const auto& entry) {
    std::error_code error;
    return entry.is_directory(error);
  });
}

bool is_weights_name(const std::string& name) {
  static const std::regex pattern(
      "(packed_)?(diffusion_pytorch_)?model(-[0-9]+-of-[0-9]+)?\\.safetensors");
  return std::regex_match(name, pattern);
}

std::optional<std::filesystem::path> nearest_file(const std::vector<std::filesystem::path>& chain,
                                                  const std::string& name) {
  for (const std::filesystem::path& directory : chain)
    if (std::filesystem::exists(directory / name)) return directory / name;
  return std::nullopt;
}

std::vector<std::string> companion_files(const std::filesystem::path& root) {
  std::error_code error;
  if (std::filesystem::is_regular_file(root, error)) return {};
  return files_of(root, is_companion);
}

std::vector<std::string> safetensors_files(const std::filesystem::path& directory) {
  return files_of(directory, [](std::string_view name) { return name.ends_with(".safetensors"); });
}

}  // namespace espalier::io
