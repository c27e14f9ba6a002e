/// GPT-NeoX (Pythia, Dolly): attention beside the feed-forward, each with its layer norm (or one
/// after the other), rotary positions on a part of each head, q, k and v of each head together in
/// one tensor.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_gpt_neox(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a;
  read_heads(a, config, "hidden_size", "num_attention_heads");
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.intermediate = config.integer("intermediate_size", 1, kSizeLimit);
  a.vocabulary = config.integer("vocab_size", 1, kVocabularyLimit);
  a.max_positions = config.integer_or("max_position_embeddings", 2048, 1, kPositionLimit);
  a.norm = Norm::layer;
  a.norm_epsilon = config.number_or("layer_norm_eps", 1e-5);
  a.parallel = config.flag_or("use_parallel_residual", true);
  a.activation = read_activation(config, "hidden_act", "gelu");
  a.rotary =
      read_rotary(config, a.head_size, a.max_positions, {"rotary_emb_base", "rotary_pct", 0.25});
  a.tied_head = config.flag_or("tie_word_embeddings", false);

  const bool bias = config.flag_or("attention_bias", true);
  const std::string root = checkpoint.has("embed_in.weight") ? "" : "gpt_neox.";
  a.block_prefix = root + "layers.";
  const auto third = [](int64_t part) {
    return Stored{"attention.query_key_value", false, 3, part, true};
  };
  const int64_t n = a.hidden;
  a.linears = {{kQuery, kAttentionInput, "attention.query_key_value.q", n, n, bias, third(0)},
               {kKey, kAttentionInput, "attention.query_key_value.k", n, n, bias, third(1)},
               {kValue, kAttentionInput, "attention.query_key_value.v", n, n, bias, third(2)},
               {kOutput, kAttentionOutput, "attention.dense", n, n, bias},
               {kUp, kFeedForwardInput, "mlp.dense_h_to_4h", a.intermediate, n, true},
               {kDown, kFeedForwardMiddle, "mlp.dense_4h_to_h", n, a.intermediate, true}};
  a.attention_norm = {"input_layernorm.weight", "input_layernorm.bias"};
  a.feed_forward_norm = {"post_attention_layernorm.weight", "post_attention_layernorm.bias"};
  a.token_embedding = root + "embed_in.weight";
  a.final_norm = {root + "final_layer_norm.weight", root + "final_layer_norm.bias"};
  a.head = "embed_out.weight";
  return a;
}

const ArchitectureRegistration gpt_neox{"gpt_neox", read_gpt_neox};

}  // namespace
}  // namespace espalier::model
