/// LLaMA 1-3, Mistral, SmolLM2: rms norms before, gated feed-forward, rotary positions,
/// grouped-query attention, tied or untied head.

#include <fmt/format.h>

#include "pipeline/model/architecture.h"

namespace espalier::model {
namespace {

/// transformers 5 writes rope_parameters {rope_type, rope_theta, ...}; before, rope_theta and
/// rope_scaling.
Rotary read_rotary(const ConfigReader& config, int64_t head_size, int64_t max_positions) {
  const bool one_table = config.has("rope_parameters");
  const bool scaled = config.has("rope_scaling");
  const ConfigReader table = one_table ? config.child("rope_parameters")
                             : scaled  ? config.child("rope_scaling")
                                       : config;
  Rotary rotary;
  // A default would be wrong in silence: SmolLM2's is 100000, LLaMA 3's 500000.
  rotary.theta = one_table ? table.number("rope_theta") : config.number("rope_theta");
  if (rotary.theta <= 1) config.fail(fmt::format("rope_theta: {} is not above 1", rotary.theta));
  rotary.rotated = head_size;
  if (one_table || scaled) {
    rotary.type = table.text_or("rope_type", table.text_or("type", "default"));
    rotary.factor = table.number_or("factor", 1);
    if (rotary.factor < 1) table.fail(fmt::format("factor: {} is below 1", rotary.factor));
  }
  if (rotary.type == "llama3") {
    rotary.low_frequency_factor = table.number("low_freq_factor");
    rotary.high_frequency_factor = table.number("high_freq_factor");
    rotary.original_positions =
        table.integer_or("original_max_position_embeddings", max_positions, 1, int64_t{1} << 32);
    if (rotary.high_frequency_factor <= rotary.low_frequency_factor)
      table.fail("high_freq_factor must be above low_freq_factor");
  } else if (rotary.type != "default" && rotary.type != "linear") {
    table.fail(fmt::format("rope_type \"{}\" is not one espalier knows: default, linear, llama3",
                           rotary.type));
  }
  return rotary;
}

Architecture read_llama(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config(json, (checkpoint.root() / "config.json").string());
  constexpr int64_t kLimit = int64_t{1} << 24;
  Architecture a;
  a.hidden = config.integer("hidden_size", 1, kLimit);
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.heads = config.integer("num_attention_heads", 1, kLimit);
  a.key_value_heads = config.integer_or("num_key_value_heads", a.heads, 1, kLimit);
  a.head_size = config.integer_or("head_dim", a.hidden / a.heads, 1, kLimit);
  a.intermediate = config.integer("intermediate_size", 1, kLimit);
  a.vocabulary = config.integer("vocab_size", 1, int64_t{1} << 31);
  a.max_positions = config.integer_or("max_position_embeddings", 2048, 1, int64_t{1} << 32);
  a.norm_epsilon = config.number_or("rms_norm_eps", 1e-6);
  if (a.heads % a.key_value_heads != 0)
    config.fail(fmt::format("num_attention_heads {} is no multiple of num_key_value_heads {}",
                            a.heads, a.key_value_heads));
  if (a.head_size % 2 != 0) config.fail(fmt::format("head_dim {} is odd", a.head_size));
  if (config.text_or("hidden_act", "silu") != "silu")
    config.fail("hidden_act must be silu for this architecture");
  a.rotary = read_rotary(config, a.head_size, a.max_positions);
  // LLaMA's configurations may carry the key; only Mistral's attention uses it.
  if (config.text_or("model_type", "") == "mistral" && config.has("sliding_window"))
    a.sliding_window = config.integer("sliding_window", 1, int64_t{1} << 32);
  a.tied_head = config.flag_or("tie_word_embeddings", false);

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
  a.head = a.tied_head ? a.token_embedding : "lm_head.weight";
  return a;
}

const ArchitectureRegistration llama{"llama", read_llama};
const ArchitectureRegistration mistral{"mistral", read_llama};

}  // namespace
}  // namespace espalier::model
