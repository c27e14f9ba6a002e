/// OPT: layer norms before (350m: after), learned positions behind two unused rows, token
/// embeddings that may be narrower than the hidden states (350m), tied head.

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_opt(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a;
  read_heads(a, config, "hidden_size", "num_attention_heads");
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.intermediate = config.integer("ffn_dim", 1, kSizeLimit);
  a.vocabulary = config.integer("vocab_size", 1, kVocabularyLimit);
  a.embedding_size = config.integer_or("word_embed_proj_dim", a.hidden, 1, kSizeLimit);
  a.max_positions = config.integer("max_position_embeddings", 1, kPositionLimit);
  a.position_offset = 2;
  a.norm = Norm::layer;
  a.norm_epsilon = 1e-5;
  a.norm_first = config.flag_or("do_layer_norm_before", true);
  a.activation = read_activation(config, "activation_function", "relu");
  a.tied_head = config.flag_or("tie_word_embeddings", true);
  if (!config.flag_or("layer_norm_elementwise_affine", true))
    config.fail("layer_norm_elementwise_affine: false is not supported");

  const bool bias = config.flag_or("enable_bias", true);
  const std::string root =
      checkpoint.has("decoder.embed_tokens.weight") ? "decoder." : "model.decoder.";
  a.block_prefix = root + "layers.";
  a.linears = {{kQuery, kAttentionInput, "self_attn.q_proj", a.hidden, a.hidden, bias},
               {kKey, kAttentionInput, "self_attn.k_proj", a.hidden, a.hidden, bias},
               {kValue, kAttentionInput, "self_attn.v_proj", a.hidden, a.hidden, bias},
               {kOutput, kAttentionOutput, "self_attn.out_proj", a.hidden, a.hidden, bias},
               {kUp, kFeedForwardInput, "fc1", a.intermediate, a.hidden, bias},
               {kDown, kFeedForwardMiddle, "fc2", a.hidden, a.intermediate, bias}};
  a.attention_norm = {"self_attn_layer_norm.weight", "self_attn_layer_norm.bias"};
  a.feed_forward_norm = {"final_layer_norm.weight", "final_layer_norm.bias"};
  a.token_embedding = root + "embed_tokens.weight";
  a.position_embedding = root + "embed_positions.weight";
  if (a.norm_first && !config.flag_or("_remove_final_layer_norm", false))
    a.final_norm = {root + "final_layer_norm.weight", root + "final_layer_norm.bias"};
  if (a.embedding_size != a.hidden) {
    a.project_in = root + "project_in.weight";
    a.project_out = root + "project_out.weight";
  }
  a.head = "lm_head.weight";
  return a;
}

const ArchitectureRegistration opt{"opt", read_opt};

}  // namespace
}  // namespace espalier::model
