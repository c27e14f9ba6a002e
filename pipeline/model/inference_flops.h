#pragma once
/// FLOPs of inference: what the forward pass of one sequence multiplies and adds.
///
/// Counted, two for a multiplication with its addition:
///   - the products of the blocks' linear layers, and of what stands beside them: r (in + out) and
///     one for each stored position of every token;
///   - attention's two products, queries with keys and weights with values, over the pairs that are
///     seen (causal: a token and those before it, within the window); DeBERTa's products with
///     embeddings of distances, and their projections, once a sequence;
///   - projections around the embeddings;
///   - the output embedding at every token whose logits are asked for, or the matrices of a
///     classification head, once a sequence.
/// Not counted: look-ups, norms, activations, softmax, rotary positions, biases, padding.
///
/// `dense` is what a product over the matrices as they are stored costs; `nonzero` counts of these
/// matrices the weights that are not 0 (attention's products in full). Heads that left the model
/// are in neither.

#include <cstdint>
#include <map>
#include <string>

#include "pipeline/model/architecture.h"

namespace espalier::model {

struct TensorCount {
  int64_t elements = 0, nonzeros = 0;
};
/// Of the checkpoint's parameters by name (parameter_names.h).
using TensorCounts = std::map<std::string, TensorCount>;

struct Flops {
  double dense = 0, nonzero = 0;
};

class InferenceFlops {
 public:
  /// `head`: the matrices behind the last block, together.
  InferenceFlops(const Architecture& architecture, const TensorCounts& counts,
                 const TensorCount& head);
  /// Of a sequence of `length` tokens with the head applied to `scored` rows.
  Flops of(int64_t length, int64_t scored) const;

 private:
  TensorCount token_, head_;        // multiplied with each token; with each scored row
  double pair_ = 0;                 // FLOPs of one query and key that meet, all blocks and heads
  double distance_ = 0, once_ = 0;  // of each token with the distances; of a sequence
  bool causal_ = true;
  int64_t window_ = 0;  // 0: none
};

}  // namespace espalier::model
