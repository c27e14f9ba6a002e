/// GPT-2: layer norms before, learned positions, q, k and v in one tensor, weights kept transposed
/// ([in, out], transformers' Conv1D), tied head.

#include <fmt/format.h>

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

Architecture read_gpt2(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  Architecture a;
  read_heads(a, config, "n_embd", "n_head");
  a.blocks = config.integer("n_layer", 1, 100000);
  a.intermediate = config.integer_or("n_inner", 4 * a.hidden, 1, kSizeLimit);
  a.vocabulary = config.integer("vocab_size", 1, kVocabularyLimit);
  a.max_positions = config.integer("n_positions", 1, kPositionLimit);
  a.norm = Norm::layer;
  a.norm_epsilon = config.number_or("layer_norm_epsilon", 1e-5);
  a.activation = read_activation(config, "activation_function", "gelu_new");
  a.tied_head = config.flag_or("tie_word_embeddings", true);
  if (!config.flag_or("scale_attn_weights", true))
    config.fail("scale_attn_weights: false is not supported");
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"})
    if (config.flag_or(key, false)) config.fail(fmt::format("{}: true is not supported", key));

  // The first checkpoints were written without "transformer.".
  const std::string root = checkpoint.has("wte.weight") ? "" : "transformer.";
  a.block_prefix = root + "h.";
  const Stored transposed{"", true};
  const auto third = [](int64_t part) { return Stored{"attn.c_attn", true, 3, part}; };
  const int64_t n = a.hidden;
  a.linears = {{kQuery, kAttentionInput, "attn.c_attn.q", n, n, true, third(0)},
               {kKey, kAttentionInput, "attn.c_attn.k", n, n, true, third(1)},
               {kValue, kAttentionInput, "attn.c_attn.v", n, n, true, third(2)},
               {kOutput, kAttentionOutput, "attn.c_proj", n, n, true, transposed},
               {kUp, kFeedForwardInput, "mlp.c_fc", a.intermediate, n, true, transposed},
               {kDown, kFeedForwardMiddle, "mlp.c_proj", n, a.intermediate, true, transposed}};
  a.attention_norm = {"ln_1.weight", "ln_1.bias"};
  a.feed_forward_norm = {"ln_2.weight", "ln_2.bias"};
  a.token_embedding = root + "wte.weight";
  a.position_embedding = root + "wpe.weight";
  a.final_norm = {root + "ln_f.weight", root + "ln_f.bias"};
  a.head = "lm_head.weight";
  return a;
}

const ArchitectureRegistration gpt2{"gpt2", read_gpt2};

}  // namespace
}  // namespace espalier::model
