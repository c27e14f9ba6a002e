#pragma once
/// Sequences that begin alike, their beginning computed once: the choices of a question behind its
/// prompt. Under causal attention a token's hidden state depends on those before it alone, so that
/// the shared rows are the same in every sequence.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "pipeline/model/attention.h"

namespace espalier::model {

/// Rows of a unit: those of the trunk, then those of each branch. A sequence is the trunk and one
/// branch.
struct SequenceTree {
  int64_t trunk = 0;
  std::vector<int64_t> branches;  ///< one at least, each of a row at least

  int64_t rows() const;
  int64_t longest() const;  ///< sequence
};

/// Of tensors with a row a token of the trees, one tree after another: q [rows, heads*size], k and
/// v [rows, key_value_heads*size]; the rest as of attention(). Each sequence's attention is
/// computed whole, the trunk's part too: at a few hundred tokens that is little beside the linear
/// layers. Throws DefectError unless shape.causal.
at::Tensor tree_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& cosine, const at::Tensor& sine,
                          const std::vector<SequenceTree>& trees, const AttentionShape& shape);

/// int64 [rows]: the position of every row in its sequences.
at::Tensor tree_positions(const std::vector<SequenceTree>& trees);

}  // namespace espalier::model
