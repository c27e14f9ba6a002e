#pragma once
/// The rows and columns of a layer that belong to heads: taken out where heads go, and put back as
/// zeros for a program that knows no missing heads.

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "pipeline/model/added_terms.h"
#include "pipeline/model/architecture.h"

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

}  // namespace espalier::model
