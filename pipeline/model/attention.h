#pragma once
/// Attention of one sequence, written from products: the masked half is skipped, the softmax is one
/// fused pass, and the backward pass recomputes the probabilities from the log-sum-exp.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace espalier::model {

struct AttentionShape {
  int64_t heads = 0, key_value_heads = 0, head_size = 0;
  bool causal = true;
  std::optional<int64_t> sliding_window;
  int64_t rotated = 0;  ///< features of a head that turn; 0 without rotary positions
};

/// q [tokens, heads*size], k and v [tokens, key_value_heads*size] of `sequences` sequences of equal
/// length, one after another; cosine, sine float32 [length, rotated/2] (undefined without
/// rotation). `visible` [sequences] int64: tokens of each sequence that may be attended to (padding
/// behind), or undefined for all. Returns [tokens, heads*size]. Differentiable in q, k and v. About
/// 2 * tokens * length * heads * size FLOPs (causal), workspace 128 * length floats.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences,
                     const AttentionShape& shape, const at::Tensor& visible = {});

}  // namespace espalier::model
