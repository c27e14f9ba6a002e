#pragma once
/// The rows and columns of a layer that belong to heads: taken out where heads go, and put back as
/// zeros for a program that knows no missing heads.

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/stored_layers.h"

namespace espalier::model {

/// Which rows (of q, k, v) or columns (of the output projection) of a layer [out, in] stay.
struct HeadSlice {
  int64_t out = 0, in = 0;   ///< before
  at::Tensor rows, columns;  ///< int64, ascending; undefined: all
  bool touches() const { return rows.defined() || columns.defined(); }
};

/// From the heads `before` of a block to `after`, which are some of them.
HeadSlice head_slice(const Architecture& architecture, const Linear& linear,
                     const BlockHeads& before, const BlockHeads& after);

/// Of a tensor [out, ...] or [..., in] what stays, contiguous; the tensor itself where all does.
at::Tensor take_rows(const HeadSlice& slice, const at::Tensor& tensor);
at::Tensor take_columns(const HeadSlice& slice, const at::Tensor& tensor);
/// Back in the full shape, zeros where something was taken.
at::Tensor put_rows(const HeadSlice& slice, const at::Tensor& tensor);
at::Tensor put_columns(const HeadSlice& slice, const at::Tensor& tensor);

/// Flat positions in [out, in]: which of them stay (int64 indices), and their places in what is
/// left.
std::pair<at::Tensor, at::Tensor> take_positions(const HeadSlice& slice,
                                                 const at::Tensor& positions);

/// The terms beside the layer: `up` and the bias follow the rows, `down` the columns.
AddedTerms take_terms(const HeadSlice& slice, const AddedTerms& terms);
AddedTerms put_terms(const HeadSlice& slice, const AddedTerms& terms);

/// The block's stored tensors that have rows or columns of heads, and what stands beside them,
/// brought from the heads of `there` to those of `wanted`: some of them (what goes is taken), or
/// more (zeros are put). Ordered so that all are aligned in a safetensors file.
NamedTensors with_heads(const io::Checkpoint& checkpoint, const Architecture& there,
                        const Architecture& wanted, int64_t block);

}  // namespace espalier::model
