#include "pipeline/io/manifest.h"

#include <fmt/format.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/json.h"

namespace espalier::io {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kManifestFile = "manifest.json";
constexpr const char* kStateDirectory = "state";
constexpr size_t kMaxManifestBytes = size_t{64} << 20;

/// Reads one field after the other; messages name file and key.
class Fields {
 public:
  Fields(const json& object, std::string origin) : object_(object), origin_(std::move(origin)) {
    if (!object.is_object()) refuse("is not an object");
  }
  const json& at(const char* key) const {
    const auto found = object_.find(key);
    if (found == object_.end()) refuse(fmt::format("has no \"{}\"", key));
    return *found;
  }
  std::string text(const char* key) const {
    if (!at(key).is_string()) refuse(fmt::format("\"{}\" is not a text", key));
    return at(key).get<std::string>();
  }
  double number(const char* key) const {
    if (!at(key).is_number()) refuse(fmt::format("\"{}\" is not a number", key));
    return at(key).get<double>();
  }
  int64_t count(const char* key) const { return checked_count(at(key), key); }
  std::vector<int64_t> counts(const char* key) const {
    std::vector<int64_t> values;
    for (const json& value : array(key)) values.push_back(checked_count(value, key));
    return values;
  }
  const json& array(const char* key) const {
    if (!at(key).is_array()) refuse(fmt::format("\"{}\" is not a list", key));
    return at(key);
  }
  [[noreturn]] void refuse(const std::string& problem) const {
    throw UserError(
        fmt::format("{}: {}; remove the file to run the stage again", origin_, problem));
  }

 private:
  int64_t checked_count(const json& value, const char* key) const {
    const int64_t number = non_negative_integer(value);
    if (number < 0) refuse(fmt::format("\"{}\" is not a whole number from 0 on", key));
    return number;
  }

  const json& object_;
  std::string origin_;
};

/// A path that stays below the stage's directory whatever the manifest says.
bool stays_below(const fs::path& path) {
  return !path.empty() && path.is_relative() &&
         std::find(path.begin(), path.end(), fs::path("..")) == path.end();
}

Output read_output(const json& value, const std::string& origin) {
  const Fields fields(value, origin + ": an output");
  Output output{fields.text("path"), fields.count("bytes"), fields.text("checksum")};
  if (!stays_below(output.path)) {
    fields.refuse(fmt::format("path \"{}\" leads out of the stage's directory", output.path));
  }
  return output;
}

}  // namespace

std::vector<Output> find_outputs(const std::filesystem::path& stage_directory) {
  std::vector<Output> outputs;
  std::error_code error;
  fs::recursive_directory_iterator entry(stage_directory, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    const fs::path relative = entry->path().lexically_relative(stage_directory);
    if (entry->is_directory() && relative == kStateDirectory) {
      entry.disable_recursion_pending();
    }
    if (!entry->is_regular_file() || relative == kManifestFile || is_temporary(relative)) continue;
    outputs.push_back({relative.generic_string(), static_cast<int64_t>(entry->file_size()), ""});
  }
  if (error) {
    throw_environment_error(stage_directory, "the directory cannot be read", error.value());
  }
  std::sort(outputs.begin(), outputs.end(),
            [](const Output& a, const Output& b) { return a.path < b.path; });
  return outputs;
}

std::vector<Output> list_outputs(const std::filesystem::path& stage_directory) {
  std::vector<Output> outputs = find_outputs(stage_directory);
  for (Output& output : outputs) output.checksum = file_checksum(stage_directory / output.path);
  return outputs;
}

nlohmann::json json_of(const std::vector<Output>& outputs) {
  json list = json::array();
  for (const Output& output : outputs) {
    list.push_back({{"path", output.path}, {"bytes", output.bytes}, {"checksum", output.checksum}});
  }
  return list;
}

std::vector<Output> outputs_of(const nlohmann::json& list, const std::string& origin) {
  std::vector<Output> outputs;
  for (const json& value : list) outputs.push_back(read_output(value, origin));
  return outputs;
}

void write_manifest(const std::filesystem::path& stage_directory, const Manifest& manifest) {
  const json content = {{"stage", manifest.stage},
                        {"key", manifest.key},
                        {"status", manifest.status},
                        {"seconds", manifest.seconds},
                        {"peak_resident_bytes", manifest.peak_resident_bytes},
                        {"bytes_sent", manifest.bytes_sent},
                        {"outputs", json_of(manifest.outputs)},
                        {"facts", manifest.facts}};
  write_file(stage_directory / kManifestFile,
             content.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

std::optional<Manifest> read_manifest(const std::filesystem::path& stage_directory) {
  const fs::path file = stage_directory / kManifestFile;
  if (!fs::exists(file)) return std::nullopt;
  const json content = parse_json(read_file(file, kMaxManifestBytes), file.string());
  const Fields fields(content, file.string());
  Manifest manifest;
  manifest.stage = fields.text("stage");
  manifest.key = fields.text("key");
  manifest.status = fields.text("status");
  manifest.seconds = fields.number("seconds");
  manifest.peak_resident_bytes = fields.counts("peak_resident_bytes");
  manifest.bytes_sent = fields.counts("bytes_sent");
  manifest.outputs = outputs_of(fields.array("outputs"), file.string());
  manifest.facts = fields.at("facts");
  return manifest;
}

std::string damage_of(const std::filesystem::path& stage_directory, const Output& output) {
  const fs::path file = stage_directory / output.path;
  std::error_code error;
  if (!fs::is_regular_file(file, error)) return fmt::format("{}: is missing", file.string());
  const auto bytes = static_cast<int64_t>(fs::file_size(file, error));
  if (bytes != output.bytes) {
    return fmt::format("{}: has {} bytes, the manifest says {}", file.string(), bytes,
                       output.bytes);
  }
  const std::string found = file_checksum(file);
  if (found == output.checksum) return "";
  return fmt::format("{}: has checksum {}, the manifest says {}", file.string(), found,
                     output.checksum);
}

std::string damaged_output(const std::filesystem::path& stage_directory, const Manifest& manifest) {
  for (const Output& output : manifest.outputs) {
    const std::string damage = damage_of(stage_directory, output);
    if (!damage.empty()) return damage;
  }
  return "";
}

}  // namespace espalier::io
