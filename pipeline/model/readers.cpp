#include "pipeline/model/readers.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

namespace espalier::model {

ConfigReader config_reader(const nlohmann::json& config, const io::Checkpoint& checkpoint) {
  return {config, (checkpoint.root() / "config.json").string()};
}

Activation read_activation(const ConfigReader& config, const std::string& key,
                           const std::string& otherwise) {
  const std::string name = config.text_or(key, otherwise);
  if (name == "gelu" || name == "gelu_python") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh" || name == "gelu_fast")
    return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu" || name == "swish") return Activation::silu;
  config.fail(
      fmt::format("{} \"{}\" is not one espalier knows: gelu, gelu_new, "
                  "gelu_pytorch_tanh, relu, silu",
                  key, name));
}

namespace {

/// Rotary positions as `table` has them, and the keys outside where it has none.
Rotary read_rotary_table(const ConfigReader& config, const ConfigReader& table, int64_t head_size,
                         int64_t max_positions, const RotaryKeys& keys) {
  Rotary rotary;
  // A default would be wrong in silence: SmolLM2's is 100000, LLaMA 3's 500000.
  rotary.theta = table.has("rope_theta") ? table.number("rope_theta") : config.number(keys.theta);
  if (rotary.theta <= 1)
    config.fail(fmt::format("{}: {} is not above 1", keys.theta, rotary.theta));
  double share = 1;
  if (!keys.share.empty())
    share =
        table.number_or("partial_rotary_factor", config.number_or(keys.share, keys.default_share));
  rotary.rotated = static_cast<int64_t>(static_cast<double>(head_size) * share);
  if (share > 1 || rotary.rotated < 2 || rotary.rotated % 2 != 0)
    config.fail(
        fmt::format("{} of a head's {} features would turn; an even number from 2 to {} "
                    "is expected",
                    rotary.rotated, head_size, head_size));
  rotary.type = table.text_or("rope_type", table.text_or("type", "default"));
  rotary.factor = table.number_or("factor", 1);
  if (rotary.factor < 1) table.fail(fmt::format("factor: {} is below 1", rotary.factor));
  if (rotary.type == "llama3") {
    rotary.low_frequency_factor = table.number("low_freq_factor");
    rotary.high_frequency_factor = table.number("high_freq_factor");
    rotary.original_positions =
        table.integer_or("original_max_position_embeddings", max_positions, 1, kPositionLimit);
    if (rotary.high_frequency_factor <= rotary.low_frequency_factor)
      table.fail("high_freq_factor must be above low_freq_factor");
  } else if (rotary.type != "default" && rotary.type != "linear") {
    table.fail(fmt::format("rope_type \"{}\" is not one espalier knows: default, linear, llama3",
                           rotary.type));
  }
  return rotary;
}

bool are_equal(const Rotary& one, const Rotary& other) {
  const auto values = [](const Rotary& r) {
    return std::tie(r.theta, r.rotated, r.type, r.factor, r.low_frequency_factor,
                    r.high_frequency_factor, r.original_positions);
  };
  return values(one) == values(other);
}

}  // namespace

Rotary read_rotary(const ConfigReader& config, int64_t head_size, int64_t max_positions,
                   const RotaryKeys& keys) {
  const auto read = [&](const ConfigReader& table) {
    return read_rotary_table(config, table, head_size, max_positions, keys);
  };
  const bool one_table = config.has("rope_parameters"), scaled = config.has("rope_scaling");
  if (!one_table && !scaled) {
    static const nlohmann::json nothing = nlohmann::json::object();
    return read({nothing, ""});
  }
  const ConfigReader table = config.child(scaled ? "rope_scaling" : "rope_parameters");
  const bool has_theta = table.has("rope_theta") || config.has(keys.theta);
  if (one_table && scaled &&
      (!has_theta || !are_equal(read(table), read(config.child("rope_parameters")))))
    config.fail(
        "rope_parameters and rope_scaling do not say the same; transformers reads rope_scaling "
        "alone where both stand: remove the one that is not meant");
  return read(table);
}

void read_heads(Architecture& a, const ConfigReader& config, const std::string& hidden,
                const std::string& heads) {
  a.hidden = config.integer(hidden, 1, kSizeLimit);
  a.heads = a.key_value_heads = config.integer(heads, 1, kSizeLimit);
  if (a.hidden % a.heads != 0)
    config.fail(fmt::format("{} {} is no multiple of {} {}", hidden, a.hidden, heads, a.heads));
  a.head_size = a.hidden / a.heads;
}

Architecture read_gated_decoder(const ConfigReader& config, const std::string& activation,
                                int64_t head_size, bool tied) {
  Architecture a;
  a.hidden = config.integer("hidden_size", 1, kSizeLimit);
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.heads = config.integer("num_attention_heads", 1, kSizeLimit);
  a.key_value_heads = config.integer_or("num_key_value_heads", a.heads, 1, kSizeLimit);
  a.states_head_size = true;
  a.head_size =
      config.integer_or("head_dim", head_size > 0 ? head_size : a.hidden / a.heads, 1, kSizeLimit);
  a.intermediate = config.integer("intermediate_size", 1, kSizeLimit);
  a.vocabulary = config.integer("vocab_size", 1, kVocabularyLimit);
  a.max_positions = config.integer_or("max_position_embeddings", 2048, 1, kPositionLimit);
  a.norm_epsilon = config.number_or("rms_norm_eps", 1e-6);
  if (a.heads % a.key_value_heads != 0)
    config.fail(fmt::format("num_attention_heads {} is no multiple of num_key_value_heads {}",
                            a.heads, a.key_value_heads));
  a.activation = read_activation(config, "hidden_act", activation);
  a.rotary = read_rotary(config, a.head_size, a.max_positions);
  a.tied_head = config.flag_or("tie_word_embeddings", tied);

  const bool attention_bias = config.flag_or("attention_bias", false);
  const bool mlp_bias = config.flag_or("mlp_bias", false);
  const int64_t queries = a.heads * a.head_size, keys = a.key_value_heads * a.head_size;
  a.block_prefix = "model.layers.";
  a.linears = {{kQuery, kAttentionInput, "self_attn.q_proj", queries, a.hidden, attention_bias},
               {kKey, kAttentionInput, "self_attn.k_proj", keys, a.hidden, attention_bias},
               {kValue, kAttentionInput, "self_attn.v_proj", keys, a.hidden, attention_bias},
               {kOutput, kAttentionOutput, "self_attn.o_proj", a.hidden, queries, attention_bias},
               {kGate, kFeedForwardInput, "mlp.gate_proj", a.intermediate, a.hidden, mlp_bias},
               {kUp, kFeedForwardInput, "mlp.up_proj", a.intermediate, a.hidden, mlp_bias},
               {kDown, kFeedForwardMiddle, "mlp.down_proj", a.hidden, a.intermediate, mlp_bias}};
  a.attention_norm = {"input_layernorm.weight", ""};
  a.feed_forward_norm = {"post_attention_layernorm.weight", ""};
  a.token_embedding = "model.embed_tokens.weight";
  a.final_norm = {"model.norm.weight", ""};
  a.head = "lm_head.weight";
  return a;
}

std::optional<int64_t> read_window(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  if (json.contains("sliding_window") && json["sliding_window"].is_null()) return std::nullopt;
  return config_reader(json, checkpoint).integer_or("sliding_window", 4096, 1, kPositionLimit);
}

void read_window_of_all_blocks(Architecture& a, const nlohmann::json& json,
                               const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  if (!config.flag_or("use_sliding_window", false)) return;
  const std::optional<int64_t> window = read_window(json, checkpoint);
  if (!window) return;
  int64_t with_window = 0;
  if (config.has("layer_types")) {
    const auto types = config.texts("layer_types");
    if (static_cast<int64_t>(types.size()) != a.blocks)
      config.fail(fmt::format("layer_types has {} entries for {} layers", types.size(), a.blocks));
    with_window = std::count(types.begin(), types.end(), "sliding_attention");
  } else {
    with_window =
        std::max<int64_t>(0, a.blocks - config.integer_or("max_window_layers", 28, 0, kSizeLimit));
  }
  if (with_window == 0) return;
  if (with_window != a.blocks)
    config.fail(
        fmt::format("{} of {} layers have a sliding window; espalier reads models where "
                    "all or none have one (use_sliding_window)",
                    with_window, a.blocks));
  a.sliding_window = window;
}

std::string encoder_root(const io::Checkpoint& checkpoint, const std::string& prefix) {
  return checkpoint.has(prefix + "embeddings.word_embeddings.weight") ? prefix : "";
}

Names encoder_norm(const io::Checkpoint& checkpoint, const std::string& root,
                   const std::string& stem) {
  if (checkpoint.has(root + "embeddings.LayerNorm.gamma"))
    return {stem + "LayerNorm.gamma", stem + "LayerNorm.beta"};
  return {stem + "LayerNorm.weight", stem + "LayerNorm.bias"};
}

Architecture read_encoder(const ConfigReader& config, const io::Checkpoint& checkpoint,
                          const std::string& root) {
  Architecture a;
  a.task = Task::encoder;
  if (config.flag_or("is_decoder", false))
    config.fail("is_decoder: true is not supported; this architecture is read as an encoder");
  read_heads(a, config, "hidden_size", "num_attention_heads");
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.intermediate = config.integer("intermediate_size", 1, kSizeLimit);
  a.vocabulary = config.integer("vocab_size", 1, kVocabularyLimit);
  a.norm = Norm::layer;
  a.norm_first = false;
  a.norm_epsilon = config.number_or("layer_norm_eps", 1e-12);
  a.activation = read_activation(config, "hidden_act", "gelu");
  if (config.text_or("position_embedding_type", "absolute") != "absolute")
    config.fail("position_embedding_type must be absolute");
  a.block_prefix = root + "encoder.layer.";
  a.linears = {{kQuery, kAttentionInput, "attention.self.query", a.hidden, a.hidden, true},
               {kKey, kAttentionInput, "attention.self.key", a.hidden, a.hidden, true},
               {kValue, kAttentionInput, "attention.self.value", a.hidden, a.hidden, true},
               {kOutput, kAttentionOutput, "attention.output.dense", a.hidden, a.hidden, true},
               {kUp, kFeedForwardInput, "intermediate.dense", a.intermediate, a.hidden, true},
               {kDown, kFeedForwardMiddle, "output.dense", a.hidden, a.intermediate, true}};
  a.attention_norm = encoder_norm(checkpoint, root, "attention.output.");
  a.feed_forward_norm = encoder_norm(checkpoint, root, "output.");
  a.token_embedding = root + "embeddings.word_embeddings.weight";
  a.position_embedding = root + "embeddings.position_embeddings.weight";
  a.token_types = config.integer_or("type_vocab_size", 2, 0, kSizeLimit);
  if (a.token_types > 0) a.type_embedding = root + "embeddings.token_type_embeddings.weight";
  a.embedding_norm = encoder_norm(checkpoint, root, root + "embeddings.");
  return a;
}

}  // namespace espalier::model
