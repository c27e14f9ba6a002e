#pragma once
/// An architecture as data: names, shapes, norms, positions. Each family is one file that reads its
/// config.json and registers itself (llama.cpp, bert.cpp, ...); the block itself is written once
/// (block.h).

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/heads.h"

namespace espalier::model {

enum class Norm { rms, layer };
enum class Activation { silu, gelu, gelu_tanh, relu };
enum class Task { causal, encoder };

/// A norm's or embedding's tensors; names relative to the block, or whole. Empty: absent.
struct Names {
  std::string weight, bias;
  bool present() const { return !weight.empty(); }
};

/// The distinct inputs of a block's linear layers; a Gram is collected once for each.
enum Input : int { kAttentionInput, kAttentionOutput, kFeedForwardInput, kFeedForwardMiddle };
inline constexpr int kInputs = 4;

/// The roles of a block's linear layers, in the order in which they are computed.
enum Role : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown };
inline constexpr int kRoles = 7;

/// How a linear layer lies in the checkpoint where it is no tensor [out, in] of its own
/// (stored_layers.h turns one into the other).
struct Stored {
  std::string tensor;       ///< relative to the block: "attn.c_attn"; empty: the layer's own name
  bool transposed = false;  ///< kept as [in, out] (gpt2)
  int64_t parts = 1;        ///< layers of equal shape in one tensor
  int64_t part = 0;         ///< which of them this is
  bool by_head = false;     ///< the parts of each head stand together (gpt_neox), not whole layers
};

/// One linear layer of a block: y = x W^T + b, W [out, in].
struct Linear {
  Role role;
  Input input;
  std::string name;  ///< relative to the block: "self_attn.q_proj"; targets match its last part
  int64_t out = 0, in = 0;
  bool bias = false;
  Stored stored = {};
};

/// Rotary positions: feature i of a head turns with feature i + rotated/2.
struct Rotary {
  double theta = 0;
  int64_t rotated = 0;           ///< features of a head that turn
  std::string type = "default";  ///< default, linear, llama3
  double factor = 1, low_frequency_factor = 1, high_frequency_factor = 4;
  int64_t original_positions = 0;
};

/// DeBERTa's relative positions: query i and key j also meet through embeddings of i - j
/// (disentangled_attention.h).
struct RelativePositions {
  bool content_to_position = false, position_to_content = false;
  int64_t largest = 0;    ///< distances beyond it share an embedding
  int64_t buckets = 0;    ///< far distances in logarithmic buckets; 0: each its own
  std::string embedding;  ///< whole name, [2 * span, hidden]
  Names norm;             ///< of the embeddings; whole names, or absent
  Names key, query;       ///< their own projections, relative to the block; absent: the contents'
  int64_t span() const { return buckets > 0 ? buckets : largest; }
};

struct Architecture {
  std::string model_type;
  Task task = Task::causal;
  int64_t hidden = 0, blocks = 0, heads = 0, key_value_heads = 0, head_size = 0, intermediate = 0;
  KeptHeads kept_heads;  ///< where heads were removed: see heads_of() and in_block()
  int64_t vocabulary = 0;
  int64_t max_positions = 0;   ///< the longest sequence
  int64_t embedding_size = 0;  ///< of a token; `hidden` unless there is project_in
  Norm norm = Norm::rms;
  double norm_epsilon = 0;
  bool norm_from_one = false;  ///< norms store their weight minus 1 (gemma)
  bool norm_first = true;  ///< norm before attention and feed-forward; otherwise after the addition
  bool parallel = false;   ///< attention and feed-forward both read the block's input (norm_first)
  Activation activation = Activation::silu;
  std::optional<Rotary> rotary;
  std::optional<RelativePositions> relative;
  std::optional<int64_t> sliding_window;  ///< a token sees this many, itself among them
  double embedding_scale = 1;             ///< rounded to the type of the products
  int64_t position_offset = 0;            ///< rows of position_embedding before position 0
  std::optional<int64_t> padding_token;   ///< learned positions count the other tokens (roberta)
  bool tied_head = false;
  bool states_head_size = false;  ///< config.json's head_dim may differ from hidden / heads

  std::string block_prefix;  ///< "model.layers." ; block b's tensors start with prefix + b + "."
  /// Of every block, in the order of Role, with the sizes of a block that has all heads.
  std::vector<Linear> linears;
  Names attention_norm, feed_forward_norm;  ///< relative to the block; a parallel one may have one
  Names query_norm, key_norm;               ///< of each head's queries and keys, [head_size]
  std::string token_embedding, position_embedding, type_embedding;
  int64_t token_types = 0;  ///< rows of type_embedding
  Names embedding_norm, final_norm;
  std::string project_in, project_out;  ///< between embedding_size and hidden, without bias
  std::string head;                     ///< output embedding; the token embedding's name when tied
  std::string head_bias;                ///< [vocabulary]

  bool gated() const { return linears.size() == kRoles; }
  const Linear* find(Role role) const;
  /// The layer with its sizes in `block`: without the rows and columns of heads that are gone.
  Linear in_block(int64_t block, const Linear& linear) const;
  BlockHeads heads_of(int64_t block) const;
  std::string tensor_name(int64_t block, const std::string& relative) const;
  /// What masks and adapters call the layer's weight and bias; in the checkpoint they may be parts
  /// of other tensors: "transformer.h.0.attn.c_attn.q.weight" (stored_layers.h).
  std::string weight_name(int64_t block, const Linear& linear) const;
  std::string bias_name(int64_t block, const Linear& linear) const;
};

/// Whether the root's config.json names a family that is registered. Never throws for other models.
bool knows_architecture(const io::Checkpoint& checkpoint);

/// Reads config.json by its model_type, and heads.json where the chain has one, and checks that the
/// checkpoint holds every tensor the architecture names, in its shape. Throws UserError naming
/// directory, tensor and both shapes, or the architectures there are.
Architecture read_architecture(const io::Checkpoint& checkpoint);

/// read_architecture() of a model that espalier can run; nullopt for any other checkpoint: of no
/// registered family, or one that read_architecture refuses, whose UserError is swallowed (what
/// only looks at tensors takes such models too). A tied output embedding that is stored is compared
/// with its twin, which reads both.
std::optional<Architecture> supported_architecture(const io::Checkpoint& checkpoint);

/// Throws UserError naming `key` when the model has fewer learned positions than `length`; computed
/// ones (rotary) go on for ever.
void require_positions(const Architecture& architecture, int64_t length, const std::string& key,
                       const std::string& model);

/// A family registers how its config.json reads: const ArchitectureRegistration r{"llama", read};
struct ArchitectureRegistration {
  using Reader = Architecture (*)(const nlohmann::json& config, const io::Checkpoint& checkpoint);
  ArchitectureRegistration(const std::string& model_type, Reader reader);
};

/// Typed reading of config.json, with bounds; UserError naming the directory and the key.
class ConfigReader {
 public:
  ConfigReader(const nlohmann::json& config, std::string where) : config_(config), where_(where) {}
  int64_t integer(const std::string& key, int64_t low, int64_t high) const;
  int64_t integer_or(const std::string& key, int64_t otherwise, int64_t low, int64_t high) const;
  double number(const std::string& key) const;
  double number_or(const std::string& key, double otherwise) const;
  bool flag_or(const std::string& key, bool otherwise) const;
  std::string text_or(const std::string& key, const std::string& otherwise) const;
  /// A list of texts, or one text with "|" between them ("c2p|p2c"); empty when absent.
  std::vector<std::string> texts(const std::string& key) const;
  bool has(const std::string& key) const;
  /// The object under key as a reader of its own ("rope_parameters").
  ConfigReader child(const std::string& key) const;
  [[noreturn]] void fail(const std::string& message) const;

 private:
  const nlohmann::json& config_;
  std::string where_;
};

}  // namespace espalier::model
