/// BERT (MiniLM): layer norms after the addition, learned positions, token types, full attention.

#include "pipeline/model/architecture.h"

namespace espalier::model {
namespace {

Activation read_activation(const ConfigReader& config) {
  const std::string name = config.text_or("hidden_act", "gelu");
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu" || name == "swish") return Activation::silu;
  config.fail("hidden_act \"" + name + "\" is not one espalier knows: gelu, gelu_new, relu, silu");
}

Architecture read_bert(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config(json, (checkpoint.root() / "config.json").string());
  constexpr int64_t kLimit = int64_t{1} << 24;
  Architecture a;
  a.task = Task::encoder;
  a.hidden = config.integer("hidden_size", 1, kLimit);
  a.blocks = config.integer("num_hidden_layers", 1, 100000);
  a.heads = a.key_value_heads = config.integer("num_attention_heads", 1, kLimit);
  if (a.hidden % a.heads != 0) config.fail("hidden_size is no multiple of num_attention_heads");
  a.head_size = a.hidden / a.heads;
  a.intermediate = config.integer("intermediate_size", 1, kLimit);
  a.vocabulary = config.integer("vocab_size", 1, int64_t{1} << 31);
  a.max_positions = config.integer("max_position_embeddings", 1, int64_t{1} << 32);
  a.norm = Norm::layer;
  a.norm_first = false;
  a.norm_epsilon = config.number_or("layer_norm_eps", 1e-12);
  a.activation = read_activation(config);
  if (config.text_or("position_embedding_type", "absolute") != "absolute")
    config.fail("position_embedding_type must be absolute");

  // Task models (BertForSequenceClassification, ...) keep the encoder under "bert.".
  const std::string root = checkpoint.has("bert.embeddings.word_embeddings.weight") ? "bert." : "";
  a.block_prefix = root + "encoder.layer.";
  a.linears = {{kQuery, kAttentionInput, "attention.self.query", a.hidden, a.hidden, true},
               {kKey, kAttentionInput, "attention.self.key", a.hidden, a.hidden, true},
               {kValue, kAttentionInput, "attention.self.value", a.hidden, a.hidden, true},
               {kOutput, kAttentionOutput, "attention.output.dense", a.hidden, a.hidden, true},
               {kUp, kFeedForwardInput, "intermediate.dense", a.intermediate, a.hidden, true},
               {kDown, kFeedForwardMiddle, "output.dense", a.hidden, a.intermediate, true}};
  a.attention_norm = {"attention.output.LayerNorm.weight", "attention.output.LayerNorm.bias"};
  a.feed_forward_norm = {"output.LayerNorm.weight", "output.LayerNorm.bias"};
  a.token_embedding = root + "embeddings.word_embeddings.weight";
  a.position_embedding = root + "embeddings.position_embeddings.weight";
  a.type_embedding = root + "embeddings.token_type_embeddings.weight";
  a.embedding_norm = {root + "embeddings.LayerNorm.weight", root + "embeddings.LayerNorm.bias"};
  return a;
}

const ArchitectureRegistration bert{"bert", read_bert};

}  // namespace
}  // namespace espalier::model
