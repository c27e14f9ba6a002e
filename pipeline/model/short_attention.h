#pragma once
/// Attention of short sequences: all heads of several sequences in one batched product each. Where
/// the scores of a head are a few dozen wide, a product a head costs more in its call than in its
/// arithmetic (12 heads of 32 features at 30 tokens: 3 times the time).

#include <ATen/core/Tensor.h>

#include "pipeline/model/attention.h"

namespace espalier::model {

/// Longest sequence that goes this way.
inline constexpr int64_t kShortSequence = 128;

/// Arguments and result as of attention(); log_sum_exp float32 [sequences, heads, length] is filled
/// when defined. Workspace: about 2^20 scores of float32 and as many weights.
void short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences,
                     const AttentionShape& shape, const at::Tensor& visible, at::Tensor& out,
                     at::Tensor& log_sum_exp);

struct AttentionGradients {
  at::Tensor q, k, v;
};
/// Of q, k and v, given out, its gradient and the log-sum-exp of the pass above.
AttentionGradients short_attention_backward(const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const at::Tensor& cosine,
                                            const at::Tensor& sine, int64_t sequences,
                                            const AttentionShape& shape, const at::Tensor& visible,
                                            const at::Tensor& out, const at::Tensor& d_out,
                                            const at::Tensor& log_sum_exp);

}  // namespace espalier::model
