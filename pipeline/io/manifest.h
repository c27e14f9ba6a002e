#pragma once
/// manifest.json: what a stage did and what it left; a stage is finished when its manifest is.

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace espalier::io {

struct Output {
  std::string path;  ///< relative to the stage's directory
  int64_t bytes = 0;
  std::string checksum;
};

struct Manifest {
  std::string stage;   ///< node name, "prune"
  std::string key;     ///< hash of stage configuration, input keys and numerics version
  std::string status;  ///< "finished"
  double seconds = 0;
  std::vector<int64_t> peak_resident_bytes;  ///< VmHWM of each rank
  std::vector<int64_t> bytes_sent;           ///< of each rank
  std::vector<Output> outputs;
  nlohmann::json facts = nlohmann::json::object();  ///< device, backend, ranks, products used, ...
};

/// Lists every regular file under the stage's directory (but manifest.json, state/) as output,
/// sorted by path; its checksum is still to be computed.
std::vector<Output> find_outputs(const std::filesystem::path& stage_directory);
/// The same with checksums: reads every file.
std::vector<Output> list_outputs(const std::filesystem::path& stage_directory);
/// [{"path", "bytes", "checksum"}, ...], as the manifest holds them.
nlohmann::json json_of(const std::vector<Output>& outputs);
/// Throws UserError naming `origin` and the key unless it is such a list of paths without "..".
std::vector<Output> outputs_of(const nlohmann::json& list, const std::string& origin);
void write_manifest(const std::filesystem::path& stage_directory, const Manifest& manifest);
/// Nothing when there is none; UserError when it does not parse.
std::optional<Manifest> read_manifest(const std::filesystem::path& stage_directory);
/// Why the output is not what it was (missing, or altered); empty when it is intact. Reads the
/// file.
std::string damage_of(const std::filesystem::path& stage_directory, const Output& output);
/// The first output that is missing or altered, with the reason; empty when all are intact.
std::string damaged_output(const std::filesystem::path& stage_directory, const Manifest& manifest);

}  // namespace espalier::io
