#pragma once
/// Readings of config.json that several families share.

#include <string>

#include "pipeline/model/architecture.h"

namespace espalier::model {

inline constexpr int64_t kSizeLimit = int64_t{1} << 24;  ///< of hidden sizes and head counts
inline constexpr int64_t kVocabularyLimit = int64_t{1} << 31;
inline constexpr int64_t kPositionLimit = int64_t{1} << 32;

ConfigReader config_reader(const nlohmann::json& config, const io::Checkpoint& checkpoint);

/// An activation by transformers' name under `key`. UserError listing those there are.
Activation read_activation(const ConfigReader& config, const std::string& key,
                           const std::string& otherwise);

/// What a family calls its rotary keys, where they do not stand in rope_parameters.
struct RotaryKeys {
  std::string theta = "rope_theta";
  std::string share;         ///< of a head's features that turn; empty: the family turns all
  double default_share = 1;  ///< when config.json does not say
};
/// transformers 5 writes rope_parameters {rope_type, rope_theta, partial_rotary_factor, ...};
/// before, the keys above and rope_scaling. What stands in such a table comes before the keys.
/// UserError where both tables are there and differ, and where there is no theta.
Rotary read_rotary(const ConfigReader& config, int64_t head_size, int64_t max_positions,
                   const RotaryKeys& keys = {});

/// Sets hidden, heads, head_size (hidden / heads) and key_value_heads (as many) from two keys.
void read_heads(Architecture& architecture, const ConfigReader& config, const std::string& hidden,
                const std::string& heads);

/// The decoder that LLaMA began, under "model.": rms norms before, gated feed-forward, rotary
/// positions, grouped-query attention, biases by attention_bias and mlp_bias. What the family
/// assumes when config.json does not say: `activation`, `head_size` (0: hidden / heads), `tied`.
Architecture read_gated_decoder(const ConfigReader& config, const std::string& activation = "silu",
                                int64_t head_size = 0, bool tied = false);

/// sliding_window: 4096 when config.json does not say, as in transformers; nullopt where it is
/// null.
std::optional<int64_t> read_window(const nlohmann::json& config, const io::Checkpoint& checkpoint);

/// Qwen's sliding window: use_sliding_window with layer_types or max_window_layers. UserError when
/// some blocks have it and some have not.
void read_window_of_all_blocks(Architecture& architecture, const nlohmann::json& config,
                               const io::Checkpoint& checkpoint);

/// "bert." where the checkpoint keeps its encoder under that `prefix`, as task models
/// (BertForSequenceClassification, ...) do; else "".
std::string encoder_root(const io::Checkpoint& checkpoint, const std::string& prefix);

/// A layer norm's tensors: LayerNorm.weight and .bias, or, in an encoder that came from TensorFlow
/// (bert-base-uncased as published), LayerNorm.gamma and .beta, which transformers reads too.
Names encoder_norm(const io::Checkpoint& checkpoint, const std::string& root,
                   const std::string& stem);

/// BERT's encoder, its tensors under `root`: layer norms after the addition, learned positions.
/// Sets everything but max_positions.
Architecture read_encoder(const ConfigReader& config, const io::Checkpoint& checkpoint,
                          const std::string& root);

}  // namespace espalier::model
