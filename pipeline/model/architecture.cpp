#include "pipeline/model/architecture.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <map>
#include <numeric>
#include <sstream>

#include "pipeline/errors.h"
#include "pipeline/model/stored_layers.h"

namespace espalier::model {
namespace {

std::map<std::string, ArchitectureRegistration::Reader>& readers() {
  static std::map<std::string, ArchitectureRegistration::Reader> all;
  return all;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Refuses a checkpoint that lacks the tensor or holds it in another shape.
void require(const io::Checkpoint& checkpoint, const std::string& name,
             const std::vector<int64_t>& shape) {
  const std::string where = checkpoint.directory().string();
  if (!checkpoint.has(name))
    throw UserError(fmt::format("{}: tensor {} is missing; config.json asks for it with shape {}",
                                where, name, shape_text(shape)));
  const auto& info = checkpoint.info(name);
  if (info.shape != shape)
    throw UserError(fmt::format("{}: tensor {} has shape {}, config.json asks for {}", where, name,
                                shape_text(info.shape), shape_text(shape)));
  if (info.dtype != at::kFloat && info.dtype != at::kBFloat16 && info.dtype != at::kHalf)
    throw UserError(fmt::format("{}: tensor {} is {}; float32, bfloat16 and float16 are read",
                                where, name, c10::toString(info.dtype)));
}

void require_names(const io::Checkpoint& checkpoint, const Names& names, const std::string& prefix,
                   const std::vector<int64_t>& weight, int64_t bias) {
  if (!names.weight.empty()) require(checkpoint, prefix + names.weight, weight);
  if (!names.bias.empty()) require(checkpoint, prefix + names.bias, {bias});
}

/// What stands before the blocks and behind them.
void require_ends(const Architecture& a, const io::Checkpoint& checkpoint) {
  const auto optional = [&](const std::string& name, const std::vector<int64_t>& shape) {
    if (!name.empty()) require(checkpoint, name, shape);
  };
  require(checkpoint, a.token_embedding, {a.vocabulary, a.embedding_size});
  optional(a.position_embedding, {a.max_positions + a.position_offset, a.hidden});
  optional(a.type_embedding, {a.token_types, a.hidden});
  optional(a.project_in, {a.hidden, a.embedding_size});
  optional(a.project_out, {a.embedding_size, a.hidden});
  optional(a.head, {a.vocabulary, a.embedding_size});
  optional(a.head_bias, {a.vocabulary});
  require_names(checkpoint, a.embedding_norm, "", {a.hidden}, a.hidden);
  require_names(checkpoint, a.final_norm, "", {a.hidden}, a.hidden);
  if (!a.relative) return;
  require(checkpoint, a.relative->embedding, {2 * a.relative->span(), a.hidden});
  require_names(checkpoint, a.relative->norm, "", {a.hidden}, a.hidden);
}

void require_tensors(const Architecture& a, const io::Checkpoint& checkpoint) {
  require_ends(a, checkpoint);
  for (int64_t block = 0; block < a.blocks; ++block) {
    for (const auto& of_all : a.linears) {
      const Linear linear = a.in_block(block, of_all);
      require(checkpoint, stored_weight_name(a, block, linear), stored_weight_shape(linear));
      if (linear.bias)
        require(checkpoint, stored_bias_name(a, block, linear), {linear.out * linear.stored.parts});
    }
    const std::string prefix = a.tensor_name(block, "");
    require_names(checkpoint, a.attention_norm, prefix, {a.hidden}, a.hidden);
    require_names(checkpoint, a.feed_forward_norm, prefix, {a.hidden}, a.hidden);
    require_names(checkpoint, a.query_norm, prefix, {a.head_size}, a.head_size);
    require_names(checkpoint, a.key_norm, prefix, {a.head_size}, a.head_size);
    if (!a.relative) continue;
    const int64_t heads = a.heads_of(block).queries() * a.head_size;
    require_names(checkpoint, a.relative->key, prefix, {heads, a.hidden}, heads);
    require_names(checkpoint, a.relative->query, prefix, {heads, a.hidden}, heads);
  }
}

/// As transformers ties: a head that is stored beside the embedding and differs is a head of its
/// own, whatever config.json says. Reads both tensors, once a process.
bool is_tied(const Architecture& a, const io::Checkpoint& checkpoint) {
  if (!a.tied_head) return false;
  return !checkpoint.has(a.head) || !checkpoint.has(a.token_embedding) ||
         checkpoint.tensor_checksum(a.head) == checkpoint.tensor_checksum(a.token_embedding);
}

}  // namespace

const Linear* Architecture::find(Role role) const {
  for (const auto& linear : linears)
    if (linear.role == role) return &linear;
  return nullptr;
}

BlockHeads Architecture::heads_of(int64_t block) const {
  if (!kept_heads.empty()) return block_heads(kept_heads.at(block), heads, key_value_heads);
  std::vector<int64_t> all(heads);
  std::iota(all.begin(), all.end(), int64_t{0});
  return block_heads(all, heads, key_value_heads);
}

Linear Architecture::in_block(int64_t block, const Linear& linear) const {
  Linear sized = linear;
  if (kept_heads.empty()) return sized;
  const BlockHeads there = heads_of(block);
  if (linear.role == kQuery) sized.out = there.queries() * head_size;
  if (linear.role == kKey || linear.role == kValue) sized.out = there.key_values() * head_size;
  if (linear.role == kOutput) sized.in = there.queries() * head_size;
  return sized;
}

std::string Architecture::tensor_name(int64_t block, const std::string& relative) const {
  return fmt::format("{}{}.{}", block_prefix, block, relative);
}
std::string Architecture::weight_name(int64_t block, const Linear& linear) const {
  return tensor_name(block, linear.name + ".weight");
}
std::string Architecture::bias_name(int64_t block, const Linear& linear) const {
  return tensor_name(block, linear.name + ".bias");
}

ArchitectureRegistration::ArchitectureRegistration(const std::string& model_type, Reader reader) {
  readers()[model_type] = reader;
}

bool knows_architecture(const io::Checkpoint& checkpoint) {
  if (!std::filesystem::exists(checkpoint.root() / "config.json")) return false;
  const auto& config = checkpoint.config();
  const auto type = config.find("model_type");
  return type != config.end() && type->is_string() && readers().contains(type->get<std::string>());
}

Architecture read_architecture(const io::Checkpoint& checkpoint) {
  const auto& config = checkpoint.config();
  const std::string where = (checkpoint.root() / "config.json").string();
  const std::string type = ConfigReader(config, where).text_or("model_type", "");
  const auto found = readers().find(type);
  if (found == readers().end()) {
    std::vector<std::string> known;
    for (const auto& [name, reader] : readers()) known.push_back(name);
    throw UserError(fmt::format("{}: model_type \"{}\" is not one espalier knows: {}", where, type,
                                fmt::join(known, ", ")));
  }
  Architecture architecture = found->second(config, checkpoint);
  architecture.model_type = type;
  if (is_tied(architecture, checkpoint)) architecture.head = architecture.token_embedding;
  // A decoder with a classification head in the place of its output embedding (sequence_head.h).
  if (!checkpoint.has(architecture.head) && checkpoint.has("score.weight"))
    architecture.head = architecture.head_bias = "";
  // Rows that a stage added behind the root's embedding: the root's config.json does not know them.
  if (checkpoint.chain().size() > 1 && checkpoint.has(architecture.token_embedding) &&
      !checkpoint.info(architecture.token_embedding).shape.empty())
    architecture.vocabulary = checkpoint.info(architecture.token_embedding).shape[0];
  if (architecture.embedding_size == 0) architecture.embedding_size = architecture.hidden;
  architecture.kept_heads = read_kept_heads(checkpoint, architecture.blocks, architecture.heads);
  require_tensors(architecture, checkpoint);
  return architecture;
}

std::optional<Architecture> supported_architecture(const io::Checkpoint& checkpoint) {
  if (!knows_architecture(checkpoint)) return std::nullopt;
  try {
    return read_architecture(checkpoint);
  } catch (const UserError&) {
    return std::nullopt;
  }
}

void require_positions(const Architecture& architecture, int64_t length, const std::string& key,
                       const std::string& model) {
  if (architecture.position_embedding.empty() || length <= architecture.max_positions) return;
  throw UserError(fmt::format("{}: {} is above the {} learned positions of {}", key, length,
                              architecture.max_positions, model));
}

bool ConfigReader::has(const std::string& key) const {
  return config_.is_object() && config_.contains(key) && !config_[key].is_null();
}

int64_t ConfigReader::integer(const std::string& key, int64_t low, int64_t high) const {
  if (!has(key)) fail(key + " is missing");
  const auto& value = config_[key];
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX))
    fail(fmt::format("{} is {}; a whole number is expected", key, value.dump().substr(0, 40)));
  const int64_t v = value.get<int64_t>();
  if (v < low || v > high) fail(fmt::format("{}: {} is outside [{}, {}]", key, v, low, high));
  return v;
}

int64_t ConfigReader::integer_or(const std::string& key, int64_t otherwise, int64_t low,
                                 int64_t high) const {
  return has(key) ? integer(key, low, high) : otherwise;
}

double ConfigReader::number(const std::string& key) const {
  if (!has(key)) fail(key + " is missing");
  if (!config_[key].is_number()) fail(key + " is not a number");
  const double v = config_[key].get<double>();
  if (!std::isfinite(v)) fail(key + " is not finite");
  return v;
}

double ConfigReader::number_or(const std::string& key, double otherwise) const {
  return has(key) ? number(key) : otherwise;
}

bool ConfigReader::flag_or(const std::string& key, bool otherwise) const {
  if (!has(key)) return otherwise;
  if (!config_[key].is_boolean()) fail(key + " is not true or false");
  return config_[key].get<bool>();
}

std::string ConfigReader::text_or(const std::string& key, const std::string& otherwise) const {
  if (!has(key)) return otherwise;
  if (!config_[key].is_string()) fail(key + " is not a text");
  return config_[key].get<std::string>();
}

std::vector<std::string> ConfigReader::texts(const std::string& key) const {
  std::vector<std::string> texts;
  if (!has(key)) return texts;
  if (config_[key].is_array()) {
    for (const auto& item : config_[key]) {
      if (!item.is_string()) fail(key + " is not a list of texts");
      texts.push_back(item.get<std::string>());
    }
    return texts;
  }
  std::istringstream parts(text_or(key, ""));
  for (std::string part; std::getline(parts, part, '|');) {
    const size_t first = part.find_first_not_of(' '), last = part.find_last_not_of(' ');
    if (first != std::string::npos) texts.push_back(part.substr(first, last - first + 1));
  }
  return texts;
}

ConfigReader ConfigReader::child(const std::string& key) const {
  if (!has(key) || !config_[key].is_object()) fail(key + " is not a mapping");
  return {config_[key], where_ + ": " + key};
}

void ConfigReader::fail(const std::string& message) const {
  throw UserError(where_ + ": " + message);
}

}  // namespace espalier::model
