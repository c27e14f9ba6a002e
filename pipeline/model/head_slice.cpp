#include "pipeline/model/head_slice.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace espalier::model {
namespace {

/// The places of `after` among `before`, both ascending.
std::vector<int64_t> places(const std::vector<int64_t>& before, const std::vector<int64_t>& after) {
  std::vector<int64_t> found;
  for (const int64_t head : after)
    found.push_back(std::lower_bound(before.begin(), before.end(), head) - before.begin());
  return found;
}

/// int64 [size]: where each index went, -1 where it is gone.
at::Tensor where_they_went(const at::Tensor& kept, int64_t size) {
  if (!kept.defined()) return at::arange(size, at::kLong);
  at::Tensor to = at::full({size}, -1, at::kLong);
  to.index_copy_(0, kept, at::arange(kept.numel(), at::kLong));
  return to;
}

at::Tensor put(const at::Tensor& kept, const at::Tensor& tensor, int64_t dimension, int64_t size) {
  if (!kept.defined() || !tensor.defined()) return tensor;
  std::vector<int64_t> shape = tensor.sizes().vec();
  shape[dimension] = size;
  return at::zeros(shape, tensor.options()).index_copy_(dimension, kept, tensor);
}

at::Tensor take(const at::Tensor& kept, const at::Tensor& tensor, int64_t dimension) {
  if (!kept.defined() || !tensor.defined()) return tensor;
  return tensor.index_select(dimension, kept).contiguous();
}

}  // namespace

HeadSlice head_slice(const Architecture& a, const Linear& linear, const BlockHeads& before,
                     const BlockHeads& after) {
  const auto of_queries = [&] {
    return features_of(places(before.query, after.query), a.head_size);
  };
  HeadSlice slice{linear.out, linear.in, {}, {}};
  if (linear.role == kQuery) {
    slice.out = before.queries() * a.head_size;
    slice.rows = of_queries();
  } else if (linear.role == kKey || linear.role == kValue) {
    slice.out = before.key_values() * a.head_size;
    slice.rows = features_of(places(before.key_value, after.key_value), a.head_size);
  } else if (linear.role == kOutput) {
    slice.in = before.queries() * a.head_size;
    slice.columns = of_queries();
  }
  return slice;
}

at::Tensor take_rows(const HeadSlice& slice, const at::Tensor& tensor) {
  return take(slice.rows, tensor, 0);
}
at::Tensor take_columns(const HeadSlice& slice, const at::Tensor& tensor) {
  return take(slice.columns, tensor, tensor.dim() - 1);
}
at::Tensor put_rows(const HeadSlice& slice, const at::Tensor& tensor) {
  return put(slice.rows, tensor, 0, slice.out);
}
at::Tensor put_columns(const HeadSlice& slice, const at::Tensor& tensor) {
  return put(slice.columns, tensor, tensor.dim() - 1, slice.in);
}

std::pair<at::Tensor, at::Tensor> take_positions(const HeadSlice& slice,
                                                 const at::Tensor& positions) {
  const int64_t in = slice.columns.defined() ? slice.columns.numel() : slice.in;
  const at::Tensor row = where_they_went(slice.rows, slice.out)
                             .index_select(0, at::floor_divide(positions, slice.in)),
                   column = where_they_went(slice.columns, slice.in)
                                .index_select(0, positions.remainder(slice.in));
  const at::Tensor stay = row.ge(0).logical_and(column.ge(0)).nonzero().squeeze(1);
  return {stay, (row * in + column).index_select(0, stay)};
}

AddedTerms take_terms(const HeadSlice& slice, const AddedTerms& terms) {
  AddedTerms taken = terms;
  taken.up = take_rows(slice, terms.up);
  if (terms.down.defined()) taken.down = take_columns(slice, terms.down);
  taken.bias = take_rows(slice, terms.bias);
  if (terms.sparse()) {
    const auto [stay, positions] = take_positions(slice, terms.positions);
    taken.positions = positions;
    taken.values = terms.values.index_select(0, stay);
  }
  return taken;
}

AddedTerms put_terms(const HeadSlice& slice, const AddedTerms& terms) {
  AddedTerms whole = terms;
  whole.up = put_rows(slice, terms.up);
  if (terms.down.defined()) whole.down = put_columns(slice, terms.down);
  whole.bias = put_rows(slice, terms.bias);
  if (terms.sparse()) {
    const int64_t in = slice.columns.defined() ? slice.columns.numel() : slice.in;
    const at::Tensor row = at::floor_divide(terms.positions, in),
                     column = terms.positions.remainder(in);
    whole.positions = (slice.rows.defined() ? slice.rows.index_select(0, row) : row) * slice.in +
                      (slice.columns.defined() ? slice.columns.index_select(0, column) : column);
  }
  return whole;
}

NamedTensors with_heads(const io::Checkpoint& checkpoint, const Architecture& there,
                        const Architecture& wanted, int64_t block) {
  const BlockHeads now = there.heads_of(block), then = wanted.heads_of(block);
  const bool taking = then.queries() < now.queries();
  const auto slice_of = [&](const Linear& linear) {
    return taking ? head_slice(there, linear, now, then) : head_slice(there, linear, then, now);
  };
  const auto rows = [&](const HeadSlice& slice, const at::Tensor& tensor) {
    return taking ? take_rows(slice, tensor) : put_rows(slice, tensor);
  };
  NamedTensors layers, beside;
  for (const Linear& of_all : there.linears) {
    const Linear linear = there.in_block(block, of_all);
    const HeadSlice slice = slice_of(of_all);
    if (!slice.touches()) continue;
    const auto part = [&](const std::string& stored) {
      const at::Tensor copy =
          layer_part(there, linear, checkpoint.view(stored)).clone(at::MemoryFormat::Contiguous);
      checkpoint.drop(stored);
      return copy;
    };
    const std::string name = there.weight_name(block, linear);
    const at::Tensor weight = rows(slice, part(stored_weight_name(there, block, linear)));
    layers.emplace_back(name, taking ? take_columns(slice, weight) : put_columns(slice, weight));
    if (linear.bias && slice.rows.defined())
      layers.emplace_back(there.bias_name(block, linear),
                          rows(slice, part(stored_bias_name(there, block, linear))));
    const auto terms = load_terms(checkpoint, name, linear.out, linear.in);
    if (!terms) continue;
    const Linear left = wanted.in_block(block, of_all);
    const AddedTerms changed = taking ? take_terms(slice, *terms) : put_terms(slice, *terms);
    for (auto& stored : stored_terms(name, changed, left.out, left.in))
      beside.push_back(std::move(stored));
  }
  if (there.relative) {  // DeBERTa's own projections of relative positions
    const HeadSlice slice = slice_of(*there.find(kQuery));
    for (const Names& names : {there.relative->key, there.relative->query})
      for (const std::string& part : {names.weight, names.bias})
        if (!part.empty()) {
          const std::string name = there.tensor_name(block, part);
          beside.emplace_back(name, rows(slice, checkpoint.view(name)));
        }
  }
  NamedTensors tensors = stored_tensors(wanted, checkpoint, layers);
  tensors.insert(tensors.end(), beside.begin(), beside.end());
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& x, const auto& y) {
    return x.second.element_size() > y.second.element_size();
  });
  return tensors;
}

}  // namespace espalier::model
