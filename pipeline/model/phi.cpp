/// Phi 1, 1.5 and 2: attention beside the feed-forward behind one layer norm, rotary positions on a
/// part of each head, a head with bias.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_phi(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a;
  read_heads(a, config, "hidden_size", "num_attention_heads");
  a.key_value_heads = config.integer_or("num_key_value_heads", a.heads, 1, kSizeLimit);
  if (a.heads % a.key_value_heads != 0)
    config.fail("num_attention_heads is no multiple of num_key_value_heads");
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.intermediate = config.integer("intermediate_size", 1, kSizeLimit);
  a.vocabulary = config.integer("vocab_size", 1, kVocabularyLimit);
  a.max_positions = config.integer_or("max_position_embeddings", 2048, 1, kPositionLimit);
  a.norm = Norm::layer;
  a.norm_epsilon = config.number_or("layer_norm_eps", 1e-5);
  a.parallel = true;
  a.activation = read_activation(config, "hidden_act", "gelu_new");
  a.rotary = read_rotary(config, a.head_size, a.max_positions,
                         {"rope_theta", "partial_rotary_factor", 0.5});
  a.tied_head = config.flag_or("tie_word_embeddings", false);

  const int64_t keys = a.key_value_heads * a.head_size;
  a.block_prefix = "model.layers.";
  // One norm: fc1 reads what q, k and v read.
  a.linears = {{kQuery, kAttentionInput, "self_attn.q_proj", a.hidden, a.hidden, true},
               {kKey, kAttentionInput, "self_attn.k_proj", keys, a.hidden, true},
               {kValue, kAttentionInput, "self_attn.v_proj", keys, a.hidden, true},
               {kOutput, kAttentionOutput, "self_attn.dense", a.hidden, a.hidden, true},
               {kUp, kAttentionInput, "mlp.fc1", a.intermediate, a.hidden, true},
               {kDown, kFeedForwardMiddle, "mlp.fc2", a.hidden, a.intermediate, true}};
  a.attention_norm = {"input_layernorm.weight", "input_layernorm.bias"};
  if (config.flag_or("qk_layernorm", false)) {
    a.query_norm = {"self_attn.q_layernorm.weight", "self_attn.q_layernorm.bias"};
    a.key_norm = {"self_attn.k_layernorm.weight", "self_attn.k_layernorm.bias"};
  }
  a.token_embedding = "model.embed_tokens.weight";
  a.final_norm = {"model.final_layernorm.weight", "model.final_layernorm.bias"};
  a.head = "lm_head.weight";
  a.head_bias = "lm_head.bias";
  return a;
}

const ArchitectureRegistration phi{"phi", read_phi};

}  // namespace
}  // namespace espalier::model
