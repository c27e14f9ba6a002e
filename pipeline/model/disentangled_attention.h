#pragma once
/// DeBERTa's attention (arXiv 2006.03654): beside query times key, each query meets an embedding of
/// its distance to the key (content to position), and each key one of the distance back (position
/// to content); all terms share the scale 1 / sqrt(size * terms).

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "pipeline/model/architecture.h"

namespace espalier::model {

/// q, k, v [tokens, heads * size] of `sequences` sequences of equal length, one after another;
/// position_key and position_query [2 * span, heads * size], the projected embeddings of distances,
/// each undefined when its term is absent. `visible` [sequences] int64: tokens of each sequence
/// that may be attended to (padding behind), or undefined for all. Returns [tokens, heads * size].
/// Differentiable in all five. 2 tokens (2 length + 4 span) heads size FLOPs, workspace about
/// heads * length * (3 length + 4 span) numbers.
at::Tensor disentangled_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& position_key, const at::Tensor& position_query,
                                  const RelativePositions& relative, int64_t sequences,
                                  int64_t heads, const at::Tensor& visible = {});

}  // namespace espalier::model
