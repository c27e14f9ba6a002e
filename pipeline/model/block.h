#pragma once
/// The transformer block, written once for every architecture, and the model around it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/sequence_tree.h"

namespace espalier::model {

struct NormWeights {
  at::Tensor weight, bias;
};

/// One block's tensors in the type of the products; by Role (gate undefined where not gated).
struct BlockWeights {
  std::vector<at::Tensor> weight, bias;  ///< [kRoles], weights [out, in] however they are stored
  NormWeights attention_norm, feed_forward_norm, query_norm, key_norm;
  /// DeBERTa's relative positions: their embeddings, normed [2 * span, hidden] (the same for every
  /// block), and the projections of their own, where the contents' do not serve.
  at::Tensor relative_positions;
  NormWeights relative_key, relative_query;  ///< weight [heads * size, hidden] and bias
  int64_t heads = 0, key_value_heads = 0;    ///< that the block has
  /// int64 [heads]: the key/value head of each query head, where they are not shared evenly.
  at::Tensor key_value_of = {};
  /// [kRoles], prepared: what an adapter left beside a matrix. Added behind the hook, whatever it
  /// does.
  std::vector<std::optional<AddedTerms>> added = {};
};

/// Copies block `index` out of the checkpoint, converted to `dtype` on `device`, and drops its
/// mapped pages: memory holds one block whatever the depth.
BlockWeights load_block(const io::Checkpoint& checkpoint, const Architecture& architecture,
                        int64_t index, at::ScalarType dtype, const at::Device& device = at::kCPU);

/// Where sequences stand in the rows of a unit: `sequences` of equal `length`, one after another,
/// or `trees`, one after another, whose longest sequence has `length` (causal models without a
/// padding token; nothing is padded).
struct UnitShape {
  int64_t sequences = 1, length = 0;
  at::Tensor visible;           ///< int64 [sequences]: tokens before the padding; undefined: all
  at::Tensor token_types = {};  ///< int64 [sequences * length], BERT's segments; undefined: all 0
  std::vector<SequenceTree> trees = {};
};

/// cos and sin of the rotary angles, float32 [length, rotated/2]; undefined without rotation.
struct RotaryTable {
  at::Tensor cosine, sine;
};
RotaryTable rotary_table(const Architecture& architecture, int64_t length,
                         const at::Device& device = at::kCPU);

/// How a block's linear layers are applied: where statistics are collected and adapters act.
/// x [tokens, in] -> [tokens, out]. An undefined result ends the block: nothing behind it is
/// computed.
using LinearHook =
    std::function<at::Tensor(const Linear& linear, const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias)>;
/// linalg::linear.
LinearHook plain_linear();

/// hidden_states [tokens, hidden] through one block; a new tensor. Differentiable in hidden_states,
/// in whatever the hook brings in, and in every tensor of the block that asks for it, but those of
/// linear layers only as the hook is.
at::Tensor block_forward(const Architecture& architecture, const BlockWeights& block,
                         const at::Tensor& hidden_states, const UnitShape& unit,
                         const RotaryTable& rotary, const LinearHook& linear);

/// y = norm(x) of the architecture's kind. Differentiable in x, weight and bias.
at::Tensor apply_norm(const Architecture& architecture, const NormWeights& norm,
                      const at::Tensor& x);

/// DeBERTa's embeddings of distances as they are stored, [2 * span, hidden], and their norm.
struct RelativeEmbeddings {
  at::Tensor weight;
  NormWeights norm;
};
RelativeEmbeddings load_relative(const io::Checkpoint& checkpoint, const Architecture& architecture,
                                 at::ScalarType dtype, const at::Device& device = at::kCPU);
/// What every block reads as its relative_positions. Differentiable in all of them.
at::Tensor relative_positions(const Architecture& architecture,
                              const RelativeEmbeddings& embeddings);

/// What stands before the first block and behind the last one; undefined where there is none.
struct Ends {
  at::Tensor token_embedding, position_embedding, type_embedding;
  NormWeights embedding_norm, final_norm;
  at::Tensor head;  ///< [vocabulary, embedding size]; shares memory with token_embedding when tied
  at::Tensor head_bias;                ///< [vocabulary]
  at::Tensor project_in, project_out;  ///< [hidden, embedding size] and back
};
Ends load_ends(const io::Checkpoint& checkpoint, const Architecture& architecture,
               at::ScalarType dtype, const at::Device& device = at::kCPU);

/// tokens int64 [rows of the unit] -> hidden states [rows, hidden].
at::Tensor embed(const Architecture& architecture, const Ends& ends, const at::Tensor& tokens,
                 const UnitShape& unit);
/// What the last block gives [tokens, hidden] -> what the head reads [tokens, embedding size]:
/// final norm and projection, where there are such. Differentiable in hidden_states.
at::Tensor finish(const Architecture& architecture, const Ends& ends,
                  const at::Tensor& hidden_states);

}  // namespace espalier::model
