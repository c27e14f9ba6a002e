/// DeBERTa-v2 and v3: BERT's encoder with disentangled attention to relative positions; learned
/// positions and token types may be absent.

#include <fmt/format.h>

#include <algorithm>

#include "pipeline/model/readers.h"

namespace espalier::model {
namespace {

/// What some checkpoints have and espalier does not.
void refuse_unsupported(const ConfigReader& config, const Architecture& a) {
  if (const int64_t kernel = config.integer_or("conv_kernel_size", 0, 0, kSizeLimit); kernel > 0)
    config.fail(
        fmt::format("conv_kernel_size: {}: the convolution behind the first layer "
                    "(deberta-v2-xlarge) is not supported; v3 models have none",
                    kernel));
  const auto same = [&](const char* key, int64_t size) {
    const int64_t given = config.integer_or(key, size, 1, kSizeLimit);
    if (given != size)
      config.fail(fmt::format("{}: only {} is supported, not {}", key, size, given));
  };
  same("embedding_size", a.hidden);
  same("attention_head_size", a.head_size);
}

RelativePositions read_relative(const ConfigReader& config, const io::Checkpoint& checkpoint,
                                const std::string& root) {
  RelativePositions r;
  for (const std::string& term : config.texts("pos_att_type")) {
    if (term == "c2p") {
      r.content_to_position = true;
    } else if (term == "p2c") {
      r.position_to_content = true;
    } else {
      config.fail(fmt::format("pos_att_type: \"{}\" is not one espalier knows: c2p, p2c", term));
    }
  }
  r.largest = config.integer_or("max_relative_positions", -1, -1, kSizeLimit);
  if (r.largest < 1) r.largest = config.integer("max_position_embeddings", 1, kSizeLimit);
  r.buckets = std::max<int64_t>(0, config.integer_or("position_buckets", -1, -1, kSizeLimit));
  if (r.buckets > 0 && (r.buckets < 4 || r.largest - 1 <= r.buckets / 2))
    config.fail(
        fmt::format("position_buckets: {} cannot bucket {} positions", r.buckets, r.largest));
  r.embedding = root + "encoder.rel_embeddings.weight";
  const auto norms = config.texts("norm_rel_ebd");
  if (std::find(norms.begin(), norms.end(), "layer_norm") != norms.end())
    r.norm = encoder_norm(checkpoint, root, root + "encoder.");
  if (!config.flag_or("share_att_key", false)) {
    if (r.content_to_position)
      r.key = {"attention.self.pos_key_proj.weight", "attention.self.pos_key_proj.bias"};
    if (r.position_to_content)
      r.query = {"attention.self.pos_query_proj.weight", "attention.self.pos_query_proj.bias"};
  }
  return r;
}

Architecture read_deberta_v2(const nlohmann::json& json, const io::Checkpoint& checkpoint) {
  const ConfigReader config = config_reader(json, checkpoint);
  const std::string root = encoder_root(checkpoint, "deberta.");
  Architecture a = read_encoder(config, checkpoint, root);
  refuse_unsupported(config, a);
  for (Linear& linear : a.linears)
    if (linear.role == kQuery || linear.role == kKey || linear.role == kValue)
      linear.name += "_proj";
  a.norm_epsilon = config.number_or("layer_norm_eps", 1e-7);
  a.max_positions = config.integer("max_position_embeddings", 1, kPositionLimit);
  if (!config.flag_or("position_biased_input", true)) a.position_embedding.clear();
  a.token_types = config.integer_or("type_vocab_size", 0, 0, kSizeLimit);
  if (a.token_types == 0) a.type_embedding.clear();

  const RelativePositions relative = read_relative(config, checkpoint, root);
  const bool any = relative.content_to_position || relative.position_to_content;
  if (any && !config.flag_or("relative_attention", false))
    config.fail("pos_att_type asks for relative positions and relative_attention is false");
  if (any) a.relative = relative;
  return a;
}

const ArchitectureRegistration deberta_v2{"deberta-v2", read_deberta_v2};

}  // namespace
}  // namespace espalier::model
