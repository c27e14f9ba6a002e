#include "pipeline/driver/shared_stages.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "pipeline/driver/machine.h"
#include "pipeline/driver/run_directory.h"
#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/json.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kMetricsFile = "metrics.json";
const std::string kDerived = std::string("model/") + io::kDerivedFile;
constexpr size_t kMaxJsonBytes = size_t{64} << 20;

json read_json(const fs::path& file) {
  return io::parse_json(io::read_file(file, kMaxJsonBytes), file.string());
}

/// Nothing where the manifest cannot be read: what another member suffered ends no sweep.
std::optional<io::Manifest> manifest_of(const fs::path& stage_directory) {
  try {
    return io::read_manifest(stage_directory);
  } catch (const UserError&) {
    return std::nullopt;
  }
}

/// Whether the manifest is of the wanted stage, whole in its directory, with the bits that this
/// program would compute.
bool serves(const std::optional<io::Manifest>& manifest, const std::string& key) {
  if (!manifest || manifest->key != key || manifest->status != "finished") return false;
  const json& facts = manifest->facts;
  return facts.is_object() && !facts.contains("elsewhere") && facts.contains("versions") &&
         facts["versions"] == library_versions();
}

/// Places of another member's run, as they are called in this one.
class Places {
 public:
  Places(const fs::path& other_stage, const WantedStage& wanted)
      : other_(other_stage.parent_path()), wanted_(&wanted) {
    other_start_ =
        io::text_at(read_json(other_ / "environment.json"), {"configuration", "model", "path"});
  }

  /// The same place, for what both share; nothing for what this run does not have.
  std::optional<fs::path> of(const fs::path& place) const {
    std::error_code error;
    if (place == other_start_ || fs::equivalent(place, other_start_, error))
      return wanted_->start_model;
    const fs::path inside = place.lexically_normal().lexically_relative(other_.lexically_normal());
    if (inside.empty() || *inside.begin() == "..") return place;
    const fs::path stage = *inside.begin();
    const auto manifest = manifest_of(other_ / stage);
    if (!manifest) return std::nullopt;
    const auto own = wanted_->earlier.find(manifest->key);
    if (manifest->key != wanted_->key && own == wanted_->earlier.end()) return std::nullopt;
    return wanted_->run_directory /
           (manifest->key == wanted_->key ? wanted_->directory : own->second) /
           inside.lexically_relative(stage);
  }

 private:
  fs::path other_, other_start_;
  const WantedStage* wanted_;
};

/// A stage of another member that may be taken over.
struct Offer {
  fs::path other;
  io::Manifest manifest;
  Places places;
  fs::path base;  ///< of this run, what its derived model stands on; empty where there is none
};

bool has_output(const io::Manifest& manifest, const std::string& path) {
  return std::any_of(manifest.outputs.begin(), manifest.outputs.end(),
                     [&](const io::Output& output) { return output.path == path; });
}

/// This run's model in the place of the other's base. Throws UserError when it has none, or one of
/// other bits.
fs::path base_of(const Offer& offer) {
  const fs::path model = offer.other / "model";
  const json derived = read_json(model / io::kDerivedFile);
  const auto base = offer.places.of((model / io::text_at(derived, {"base"})).lexically_normal());
  if (!base ||
      io::Checkpoint::open(*base).fingerprint() != io::text_at(derived, {"base_fingerprint"}))
    throw UserError(
        fmt::format("{} stands on a model that this run does not have", model.string()));
  return *base;
}

void link_or_copy(const fs::path& source, const fs::path& target) {
  std::error_code error;
  fs::create_directories(target.parent_path(), error);
  fs::create_hard_link(fs::weakly_canonical(source), target, error);
  if (error) io::copy_whole(source, target);  // no links here, or no more of this file
}

/// Texts that name a place of the other run name the same place of this one.
void translate(json& value, const Places& places) {
  if (value.is_structured())
    for (json& inner : value) translate(inner, places);
  if (!value.is_string()) return;
  const auto text = value.get<std::string>();
  if (text.find('/') == std::string::npos) return;
  if (const auto place = places.of(text)) value = place->string();
}

void translate_metrics(const fs::path& file, const Places& places) {
  const json before = read_json(file);
  json metrics = before;
  translate(metrics, places);
  if (metrics != before) io::write_file(file, metrics.dump(2) + "\n");
}

/// The outputs as files of `directory`; what names places names this run's. A new file replaces a
/// link, so that the other's file stays as it is.
std::vector<io::Output> fill(const Offer& offer, const fs::path& directory,
                             const comm::Communicator& group) {
  fs::remove_all(directory);
  std::vector<io::Output> outputs = offer.manifest.outputs;
  for (io::Output& output : outputs) {
    const fs::path file = directory / output.path;
    link_or_copy(offer.other / output.path, file);
    group.still_working();
    if (output.path == kMetricsFile)
      translate_metrics(file, offer.places);
    else if (output.path == kDerived)
      io::rebase_derived(file.parent_path(), offer.base);
    else
      continue;
    output.bytes = static_cast<int64_t>(fs::file_size(file));
    output.checksum = io::file_checksum(file);
  }
  return outputs;
}

/// The other's lines about the stage, losses among them, so that this run's report shows them too.
void copy_events(const fs::path& other, Progress& progress, const std::string& directory) {
  const fs::path file = other.parent_path() / "metrics.jsonl";
  if (!fs::exists(file)) return;
  const std::string text = io::read_file(file);
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    json line = json::parse(text.substr(begin, end - begin), nullptr, /*allow_exceptions=*/false);
    if (!line.is_object() || line.value("stage", json()) != other.filename().string()) continue;
    if (line.value("event", json()) == "taken_over") continue;
    line["stage"] = directory;
    progress.metric(line);
  }
}

/// What computing the stage took, where it was computed.
json cost_of(const io::Manifest& manifest) {
  const json::json_pointer computing("/taken_over/computing");
  if (manifest.facts.contains(computing)) return manifest.facts[computing];
  return {{"seconds", manifest.seconds},
          {"peak_resident_bytes", manifest.peak_resident_bytes},
          {"bytes_sent", manifest.bytes_sent}};
}

/// Nothing when the stage is of another key, of other libraries, or stands on other bits.
std::optional<Offer> offer_of(const fs::path& other, const WantedStage& wanted) {
  const auto manifest = manifest_of(other);
  if (!serves(manifest, wanted.key)) return std::nullopt;
  try {
    Offer offer{other, *manifest, Places(other, wanted), {}};
    if (has_output(*manifest, kDerived)) offer.base = base_of(offer);
    return offer;
  } catch (const UserError&) {
    return std::nullopt;
  }
}

}  // namespace

SharedStages::SharedStages(fs::path sweep_directory) : directory_(std::move(sweep_directory)) {}

void SharedStages::add(const std::string& key, const fs::path& stage_directory) {
  finished_[key].push_back(stage_directory);
}

/// A member's name may hold slashes, so its directory may lie deeper than one level.
void SharedStages::search() {
  std::error_code error;
  fs::recursive_directory_iterator entry(directory_, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    if (!is_stage_directory(entry->path())) continue;
    const auto manifest = manifest_of(entry->path());
    if (manifest || fs::exists(entry->path() / "state")) entry.disable_recursion_pending();
    if (manifest) found_[manifest->key].push_back(entry->path());
  }
  for (auto& [key, stages] : found_) std::sort(stages.begin(), stages.end());
  searched_ = true;
}

std::vector<fs::path> SharedStages::candidates(const WantedStage& wanted) {
  std::vector<fs::path> all = finished_[wanted.key];
  if (wanted.resume) {
    if (!searched_) search();
    for (const fs::path& stage : found_[wanted.key])
      if (std::find(all.begin(), all.end(), stage) == all.end()) all.push_back(stage);
  }
  std::erase_if(all,
                [&](const fs::path& stage) { return stage.parent_path() == wanted.run_directory; });
  return all;
}

std::optional<io::Manifest> SharedStages::take_over(const WantedStage& wanted,
                                                    const comm::Communicator& group,
                                                    Progress& progress) {
  const auto stages = group.is_root() ? candidates(wanted) : std::vector<fs::path>();
  for (size_t next = 0;;) {
    std::optional<Offer> offer;  // on rank 0
    while (!offer && next < stages.size()) offer = offer_of(stages[next++], wanted);
    const std::string other = group.broadcast(offer ? offer->other.string() : "");
    if (other.empty()) return std::nullopt;
    const std::string damage =
        damaged_output(other, offer ? offer->manifest.outputs : std::vector<io::Output>(), group);
    if (!damage.empty()) {
      progress.say(damage + "; not taken over");
      continue;
    }
    io::Manifest manifest;
    if (offer) {
      manifest = offer->manifest;
      manifest.outputs = fill(*offer, wanted.run_directory / wanted.directory, group);
      const fs::path member = offer->other.parent_path().lexically_relative(directory_);
      const json origin = {{"member", member.string()},
                           {"stage", offer->other.filename().string()},
                           {"computing", cost_of(manifest)}};
      manifest.facts["taken_over"] = origin;
      copy_events(offer->other, progress, wanted.directory);
      progress.say(fmt::format("taken over from {}", member.string()));
      progress.metric({{"event", "taken_over"}, {"from", origin}});
    }
    group.barrier();
    return manifest;
  }
}

}  // namespace espalier::driver
