#pragma once
/// Cross entropy over a large vocabulary without the whole logits matrix: chunks of 256 counted
/// tokens, the product, its soft maximum and the product back, so that at most
/// 256 * vocabulary logits live at once. Positions that do not count cost nothing.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace espalier::train {

struct LossSum {
  double loss = 0;      ///< sum of the negative log-likelihoods of the counted labels
  int64_t counted = 0;  ///< labels that are not data::kIgnored
  at::Tensor gradient;  ///< d loss / d hidden_states, in their type; undefined when not asked for
  at::Tensor head_gradient;  ///< float32 d loss / d head; undefined when not asked for
  at::Tensor bias_gradient;  ///< float32 d loss / d bias; with `gradient`, where there is a bias
};

/// hidden_states  [tokens, hidden]      float32 or bfloat16, after the final norm
/// head           [vocabulary, hidden]  the same type
/// labels         int64 [tokens]        the token to predict at each position, or kIgnored
/// bias           [vocabulary]          added to the logits when defined
/// Logits are float32. 2 counted hidden vocabulary FLOPs, twice that with the gradient, three times
/// with the head's; one thread.
/// Throws DefectError for a label outside the vocabulary. The loss of non-finite logits is not
/// finite: the caller, who knows block and step, refuses it.
LossSum loss_sum(const at::Tensor& hidden_states, const at::Tensor& head, const at::Tensor& labels,
                 bool with_gradient, bool with_head_gradient = false, const at::Tensor& bias = {});

/// float64 [tokens]: every label's own loss (0 where ignored), for metrics by sequence or choice.
at::Tensor token_losses(const at::Tensor& hidden_states, const at::Tensor& head,
                        const at::Tensor& labels, const at::Tensor& bias = {});

}  // namespace espalier::train
