#include "pipeline/io/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/json.h"
#include "pipeline/io/packed_header.h"

namespace espalier::io {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr size_t kMaxChain = 64;

/// A tensor, the file that holds it, and its name there.
struct Place {
  SafetensorsFile file;
  const TensorInfo* info;
  std::string inner;
  std::shared_ptr<const Packing> packing;  // null when it is stored as it is

  at::Tensor view() const {
    return packing ? unpack(*packing, parts(), where()) : file.view(inner);
  }
  void drop() const {
    if (packing == nullptr) return file.drop(inner);
    file.drop(inner + kValuesSuffix);
    file.drop(inner + packing->places_suffix());
  }
  /// Bytes [begin, begin + count) of a packed tensor.
  std::string bytes(int64_t begin, int64_t count) const {
    return unpack_bytes(*packing, parts(), begin, count, where());
  }

 private:
  PackedTensor parts() const {
    return {file.view(inner + kValuesSuffix), file.view(inner + packing->places_suffix())};
  }
  std::string where() const {
    return fmt::format("{}: tensor \"{}\", which is packed", file.path().string(), inner);
  }
};

using Places = std::map<std::string, Place>;

/// The tensors of a file; what is packed there stands for its parts.
Places places_of(const SafetensorsFile& file) {
  Places places;
  for (const auto& [name, info] : file.tensors())
    places.emplace(name, Place{file, &info, name, nullptr});
  for (const auto& [name, packing] : packed_tensors(file)) {
    places.erase(name + kValuesSuffix);
    places.erase(name + packing.places_suffix());
    const auto kept = std::make_shared<const Packing>(packing);
    places.emplace(name, Place{file, &kept->dense, name, kept});
  }
  return places;
}

void add_file(Places& places, const SafetensorsFile& file) {
  for (const auto& [name, of_file] : places_of(file)) {
    const auto [place, added] = places.try_emplace(name, of_file);
    if (!added) {
      throw UserError(
          fmt::format("{}: tensor \"{}\" stands in {} too; one of the files is left over "
                      "from another model, remove it",
                      file.path().string(), name, place->second.file.path().string()));
    }
  }
}

/// The shard that an index names: a plain file name, so that no index reads elsewhere.
std::string checked_shard_name(const json& value, const std::string& tensor,
                               const fs::path& index) {
  const std::string name = value.is_string() ? value.get<std::string>() : "";
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
      name.find('\0') != std::string::npos) {
    throw UserError(fmt::format(
        "{}: tensor \"{}\" is said to be in {}, which is not the name of a file "
        "beside the index",
        index.string(), tensor, value.dump(-1, ' ', false, json::error_handler_t::replace)));
  }
  return name;
}

Places open_index(const fs::path& index) {
  const json content = parse_json(read_file(index, kMaxIndexBytes), index.string());
  const auto map = content.is_object() ? content.find("weight_map") : content.end();
  if (map == content.end() || !map->is_object()) {
    throw UserError(fmt::format("{}: has no object \"weight_map\"", index.string()));
  }
  std::map<std::string, Places> shards;
  Places places;
  for (const auto& [tensor, value] : map->items()) {
    const std::string name = checked_shard_name(value, tensor, index);
    auto shard = shards.find(name);
    if (shard == shards.end()) {
      const fs::path path = index.parent_path() / name;
      if (!fs::exists(path)) {
        throw UserError(
            fmt::format("{}: tensor \"{}\" is said to be in {}, and there is no such file; "
                        "the checkpoint is incomplete, copy it again",
                        index.string(), tensor, path.string()));
      }
      shard = shards.emplace(name, places_of(SafetensorsFile(path))).first;
    }
    const auto found = shard->second.find(tensor);
    if (found == shard->second.end()) {
      throw UserError(fmt::format("{}: tensor \"{}\" is said to be in {}, which does not hold it",
                                  index.string(), tensor, name));
    }
    places.emplace(tensor, found->second);
  }
  return places;
}

[[noreturn]] void refuse_directory(const fs::path& directory) {
  std::error_code error;
  if (!fs::is_directory(directory, error)) {
    throw UserError(fmt::format("{}: there is no such model directory", directory.string()));
  }
  for (const char* pickled : {"pytorch_model.bin", "pytorch_model.bin.index.json"}) {
    if (fs::exists(directory / pickled)) {
      throw UserError(fmt::format(
          "{0}: holds {1}, which only Python can read; convert it: python3 -c \"from transformers "
          "import "
          "AutoModelForCausalLM, AutoTokenizer; AutoModelForCausalLM.from_pretrained('{0}')"
          ".save_pretrained('NEW'); AutoTokenizer.from_pretrained('{0}').save_pretrained('NEW')\", "
          "then "
          "give NEW",
          directory.string(), pickled));
    }
  }
  throw UserError(
      fmt::format("{}: holds none of {}, {}, {}, nor other *.safetensors files or folders of them; "
                  "a model directory as transformers writes it is expected",
                  directory.string(), kWeightsFile, kIndexFile, kDerivedFile));
}

using Parts = std::map<std::string, std::string>;

/// The weights that a library names as it does; `stem` tells how. Empty when there are none.
Places open_named(const fs::path& directory, std::string& stem) {
  for (const char* known : kStems) {
    const fs::path whole = directory / (std::string(known) + ".safetensors");
    const fs::path index = directory / (std::string(known) + ".safetensors.index.json");
    stem = known;
    if (fs::exists(whole)) {
      Places places;
      add_file(places, SafetensorsFile(whole));
      return places;
    }
    if (fs::exists(index)) return open_index(index);
  }
  return {};
}

/// All weights of a directory, whatever they are called (diffusers' variants, adapters); `stem`:
/// the library's own name where theirs begin with it, as they are written without a variant.
Places open_any_name(const fs::path& directory, std::string& stem) {
  Places places;
  for (const std::string& name : safetensors_files(directory)) {
    if (places.empty()) {
      stem = name.substr(0, name.rfind(".safetensors"));
      for (const char* known : kStems)
        if (name.starts_with(std::string(known) + ".") ||
            name.starts_with(std::string(known) + "-"))
          stem = known;
    }
    add_file(places, SafetensorsFile(directory / name));
  }
  return places;
}

/// The parts of a model that is a directory of models, "unet/NAME".
Places open_parts(const fs::path& directory, Parts& parts) {
  Places places;
  for (const std::string& part : subdirectories(directory)) {
    std::string stem;
    Places of_part = open_named(directory / part, stem);
    if (of_part.empty()) of_part = open_any_name(directory / part, stem);
    for (auto& [name, place] : of_part) {
      parts[part] = stem;
      places.emplace(part + "/" + name, std::move(place));
    }
  }
  return places;
}

Places open_plain(const fs::path& path, Parts& parts) {
  Places places;
  if (fs::is_regular_file(path)) {
    add_file(places, SafetensorsFile(path));
    return places;
  }
  if (!fs::is_directory(path)) refuse_directory(path);
  std::string stem;
  places = open_named(path, stem);
  if (!places.empty()) return places;
  if (!fs::exists(path / "model_index.json")) places = open_any_name(path, stem);
  if (places.empty()) places = open_parts(path, parts);
  if (places.empty()) refuse_directory(path);
  return places;
}

std::string text_field(const json& content, const char* key, const fs::path& file) {
  const auto found = content.is_object() ? content.find(key) : content.end();
  if (found == content.end() || !found->is_string()) {
    throw UserError(fmt::format("{}: has no text \"{}\"", file.string(), key));
  }
  return found->get<std::string>();
}

/// Length before each text, so that no two lists of texts read the same.
void append_text(std::string& list, const std::string& text) {
  list += fmt::format("{}:{}", text.size(), text);
}

std::string describe(const std::string& name, const TensorInfo& info) {
  std::string text;
  append_text(text, name);
  append_text(text, safetensors_dtype(info.dtype));
  append_text(text, fmt::format("{}", fmt::join(info.shape, ",")));
  return text;
}

/// Checksums of tensors already read by this process, by the identity of their file.
class ChecksumCache {
 public:
  std::string of(const Place& place) {
    const std::string key = key_of(place);
    {
      const std::lock_guard lock(mutex_);
      const auto found = known_.find(key);
      if (found != known_.end()) return found->second;
    }
    const at::Tensor view = place.view();
    const std::string result =
        checksum({static_cast<const std::byte*>(view.const_data_ptr()), view.nbytes()});
    place.drop();
    const std::lock_guard lock(mutex_);
    return known_.emplace(key, result).first->second;
  }
  void learn(const Place& place, const std::string& checksum) {
    const std::lock_guard lock(mutex_);
    known_.emplace(key_of(place), checksum);
  }

 private:
  static std::string key_of(const Place& place) {
    return fmt::format("{}@{}", place.file.identity(), place.inner);
  }

  std::mutex mutex_;
  std::unordered_map<std::string, std::string> known_;
};

ChecksumCache& checksum_cache() {
  static ChecksumCache cache;
  return cache;
}

/// First, middle and last bytes of a tensor.
std::string samples(const Place& place) {
  constexpr int64_t kSample = 256;
  const int64_t bytes = place.info->bytes();
  const int64_t count = std::min(kSample, bytes);
  // Once: a view of what lies unaligned in its file is a copy.
  const at::Tensor whole = place.packing ? at::Tensor() : place.file.view(place.inner);
  std::string text;
  for (const int64_t begin : {int64_t{0}, (bytes - count) / 2, bytes - count})
    text += place.packing ? place.bytes(begin, count)
                          : std::string(static_cast<const char*>(whole.const_data_ptr()) + begin,
                                        static_cast<size_t>(count));
  place.drop();
  return checksum(text);
}

}  // namespace

struct Checkpoint::State {
  fs::path directory;
  fs::path root;
  json config;
  Places places;
  Parts parts;
  std::shared_ptr<const State> base;  // null when this is the root
  std::string base_checksum;

  const Place& place(const std::string& name) const {
    const auto found = places.find(name);
    if (found == places.end()) {
      throw UserError(fmt::format("{}: the model has no tensor \"{}\"", directory.string(), name));
    }
    return found->second;
  }

  static std::shared_ptr<State> open(const fs::path& directory, std::vector<fs::path>& chain);
  void open_root();
  void open_derived(std::vector<fs::path>& chain);
};

std::shared_ptr<Checkpoint::State> Checkpoint::State::open(const fs::path& directory,
                                                           std::vector<fs::path>& chain) {
  std::error_code error;
  const fs::path canonical = fs::weakly_canonical(directory, error);
  if (std::find(chain.begin(), chain.end(), canonical) != chain.end()) {
    throw UserError(
        fmt::format("{}: the model stands on itself: {} names as base a directory that "
                    "leads back here; export the model dense",
                    directory.string(), kDerivedFile));
  }
  if (chain.size() == kMaxChain) {
    throw UserError(
        fmt::format("{}: stands on a chain of more than {} models; export one of them dense "
                    "and start from that",
                    chain.front().string(), kMaxChain));
  }
  chain.push_back(canonical);
  auto state = std::make_shared<State>();
  state->directory = directory;
  if (fs::exists(directory / kDerivedFile)) {
    state->open_derived(chain);
  } else {
    state->open_root();
  }
  return state;
}

void Checkpoint::State::open_root() {
  root = directory;
  places = open_plain(directory, parts);
  const fs::path file = directory / kConfigFile;
  if (!fs::is_directory(directory) || !fs::exists(file)) return;
  config = parse_json(read_file(file, kMaxConfigBytes), file.string());
  if (!config.is_object()) {
    throw UserError(fmt::format("{}: is not a JSON object", file.string()));
  }
}

void Checkpoint::State::open_derived(std::vector<fs::path>& chain) {
  const fs::path file = directory / kDerivedFile;
  const json content = parse_json(read_file(file, kMaxConfigBytes), file.string());
  const fs::path named = text_field(content, "base", file);
  const fs::path base_directory = (directory / named).lexically_normal();
  if (!is_model_path(base_directory)) {
    throw UserError(
        fmt::format("{}: its base {} is no model; put the base model back there, or "
                    "write its new place into \"base\"",
                    file.string(), base_directory.string()));
  }
  base = open(base_directory, chain);
  base_checksum = text_field(content, "base_checksum", file);
  Checkpoint base_model;
  base_model.state_ = std::const_pointer_cast<State>(base);
  const std::string expected = text_field(content, "base_fingerprint", file);
  const std::string found = base_model.fingerprint();
  if (found != expected) {
    throw UserError(
        fmt::format("{}: its base {} is not the model that it was derived from (fingerprint "
                    "{}, expected {}); put that model back or run the stage again",
                    file.string(), base_directory.string(), found, expected));
  }
  root = base->root;
  parts = base->parts;
  config = base->config;
  for (const std::string& name : safetensors_files(directory)) {
    add_file(places, SafetensorsFile(directory / name));
  }
  places.insert(base->places.begin(), base->places.end());  // keeps what is there
}

Checkpoint Checkpoint::open(const std::filesystem::path& directory) {
  std::vector<fs::path> chain;
  Checkpoint checkpoint;
  checkpoint.state_ = State::open(directory, chain);
  return checkpoint;
}

const std::filesystem::path& Checkpoint::directory() const { return state_->directory; }
const std::filesystem::path& Checkpoint::root() const { return state_->root; }

std::vector<std::filesystem::path> Checkpoint::chain() const {
  std::vector<fs::path> directories;
  for (const State* state = state_.get(); state != nullptr; state = state->base.get()) {
    directories.push_back(state->directory);
  }
  return directories;
}

const std::map<std::string, std::string>& Checkpoint::parts() const { return state_->parts; }

const nlohmann::json& Checkpoint::config() const {
  if (state_->config.is_null()) {
    throw UserError(
        fmt::format("{}: there is no such file, and without it the architecture is unknown",
                    (state_->root / kConfigFile).string()));
  }
  return state_->config;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& entry : state_->places) names.push_back(entry.first);
  return names;
}

bool Checkpoint::has(const std::string& name) const { return state_->places.count(name) > 0; }

const TensorInfo& Checkpoint::info(const std::string& name) const {
  return *state_->place(name).info;
}

at::Tensor Checkpoint::view(const std::string& name) const { return state_->place(name).view(); }

void Checkpoint::drop(const std::string& name) const { state_->place(name).drop(); }

const Packing* Checkpoint::packing(const std::string& name) const {
  return state_->place(name).packing.get();
}

std::string Checkpoint::tensors_checksum() const {
  std::string list;
  for (const auto& [name, place] : state_->places)
    list += describe(name, *place.info) + checksum_cache().of(place);
  return checksum(list);
}

std::string Checkpoint::tensor_checksum(const std::string& name) const {
  return checksum_cache().of(state_->place(name));
}

void Checkpoint::learn_tensor_checksum(const std::string& name, const std::string& checksum) const {
  checksum_cache().learn(state_->place(name), checksum);
}

std::string Checkpoint::fingerprint() const {
  std::string list;
  for (const auto& [name, place] : state_->places) {
    list += describe(name, *place.info) + samples(place);
  }
  return checksum(list);
}

void Checkpoint::verify_base() const {
  if (state_->base == nullptr) return;
  Checkpoint base;
  base.state_ = std::const_pointer_cast<State>(state_->base);
  const std::string found = base.tensors_checksum();
  if (found != state_->base_checksum) {
    throw UserError(
        fmt::format("{}: its base {} was altered since (checksum {}, expected {}); put the "
                    "base model back or run the stage again",
                    (state_->directory / kDerivedFile).string(), base.directory().string(), found,
                    state_->base_checksum));
  }
}

Checkpoint Checkpoint::without(const std::function<bool(const std::string&)>& left_out) const {
  const auto part = std::make_shared<State>(*state_);
  std::erase_if(part->places, [&](const auto& entry) { return left_out(entry.first); });
  Checkpoint rest;
  rest.state_ = part;
  return rest;
}

int64_t Checkpoint::bytes() const {
  int64_t total = 0;
  for (const auto& entry : state_->places) total += entry.second.info->bytes();
  return total;
}

}  // namespace espalier::io
