#pragma once
/// A tiny random llama with zeros in its matrices, and token data, written to a directory.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/data/token_set.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/random.h"

namespace espalier::retrain {

inline constexpr int64_t kVocabulary = 50, kHidden = 32, kIntermediate = 48, kBlocks = 3;

inline at::Tensor random_matrix(const std::string& name, int64_t rows, int64_t columns,
                                double scale, bool sparse) {
  at::Tensor out = at::empty({rows, columns});
  const CounterRandom random(11, "tiny", stream_of(name));
  for (int64_t i = 0; i < out.numel(); ++i)
    out.data_ptr<float>()[i] =
        sparse && random.below(static_cast<uint64_t>(i), 2)
            ? 0.0f
            : static_cast<float>(scale * random.normal(static_cast<uint64_t>(i)));
  return out;
}

inline void write_tiny_llama(const std::filesystem::path& directory) {
  std::filesystem::create_directories(directory);
  const nlohmann::json config = {{"model_type", "llama"},
                                 {"hidden_size", kHidden},
                                 {"intermediate_size", kIntermediate},
                                 {"num_hidden_layers", kBlocks},
                                 {"num_attention_heads", 4},
                                 {"num_key_value_heads", 2},
                                 {"vocab_size", kVocabulary},
                                 {"max_position_embeddings", 64},
                                 {"rms_norm_eps", 1e-5},
                                 {"rope_theta", 10000.0},
                                 {"hidden_act", "silu"},
                                 {"tie_word_embeddings", true}};
  io::write_file(directory / "config.json", config.dump());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t columns, bool sparse) {
    tensors.emplace_back(name, random_matrix(name, rows, columns, 0.3, sparse));
  };
  matrix("model.embed_tokens.weight", kVocabulary, kHidden, false);
  tensors.emplace_back("model.norm.weight", at::ones({kHidden}));
  for (int64_t b = 0; b < kBlocks; ++b) {
    const std::string prefix = fmt::format("model.layers.{}.", b);
    tensors.emplace_back(prefix + "input_layernorm.weight", at::ones({kHidden}));
    tensors.emplace_back(prefix + "post_attention_layernorm.weight", at::ones({kHidden}));
    matrix(prefix + "self_attn.q_proj.weight", kHidden, kHidden, true);
    matrix(prefix + "self_attn.k_proj.weight", kHidden / 2, kHidden, true);
    matrix(prefix + "self_attn.v_proj.weight", kHidden / 2, kHidden, true);
    matrix(prefix + "self_attn.o_proj.weight", kHidden, kHidden, true);
    matrix(prefix + "mlp.gate_proj.weight", kIntermediate, kHidden, true);
    matrix(prefix + "mlp.up_proj.weight", kIntermediate, kHidden, true);
    matrix(prefix + "mlp.down_proj.weight", kHidden, kIntermediate, true);
  }
  io::write_safetensors(directory / "model.safetensors", tensors);
}

/// A text that can be learnt: a noisy cycle through the vocabulary.
inline void write_tiny_text(const std::filesystem::path& file) {
  const at::Tensor tokens = at::empty({2000}, at::kInt);
  const CounterRandom random(12, "text");
  for (int i = 0; i < 2000; ++i)
    tokens.data_ptr<int32_t>()[i] = static_cast<int32_t>(
        random.below(2 * i, 8) == 0 ? random.below(2 * i + 1, kVocabulary) : (7 * i) % kVocabulary);
  io::Hdf5Writer writer(file);
  writer.write("/tokens", tokens);
  writer.write("/offsets", at::tensor({int64_t{0}, int64_t{2000}}, at::kLong));
  writer.attribute("/", "kind", std::string("text"));
  writer.attribute("/", "tokenizer_checksum", std::string("tiny"));
  writer.attribute("/", "vocabulary_size", kVocabulary);
  writer.attribute("/", "end_token", int64_t{0});
  writer.commit();
}

}  // namespace espalier::retrain
