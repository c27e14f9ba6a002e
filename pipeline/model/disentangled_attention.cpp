#include "pipeline/model/disentangled_attention.h"

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

namespace espalier::model {
namespace {

/// The bucket of every distance -(length - 1) .. length - 1, int64: itself when near, logarithmic
/// from half the buckets on. The logarithms are float32, as the models were trained with.
at::Tensor distance_buckets(const RelativePositions& r, int64_t length) {
  const at::Tensor distance = at::arange(1 - length, length, at::kLong);
  if (r.buckets == 0) return distance;
  const int64_t middle = r.buckets / 2;
  const at::Tensor size = distance.abs().clamp_min(middle - 1);
  const double last = static_cast<double>(r.largest - 1) / static_cast<double>(middle);
  const at::Tensor steps =
      at::log(size / middle) / at::log(at::scalar_tensor(last, at::kFloat)) * (middle - 1);
  const at::Tensor far = (at::ceil(steps) + middle).to(at::kLong) * distance.sign();
  return at::where(size.le(middle), distance, far);
}

/// int64 [length, length]: the row of the embeddings for every pair (i, j), of bucket(i - j) or of
/// its opposite.
at::Tensor embedding_rows(const RelativePositions& r, const at::Tensor& buckets, bool opposite) {
  const int64_t length = (buckets.size(0) + 1) / 2;
  const at::Tensor index = at::arange(length, at::kLong);
  const at::Tensor pairs =
      buckets.index_select(0, (index.unsqueeze(1) - index + (length - 1)).flatten());
  return ((opposite ? -pairs : pairs) + r.span()).clamp(0, 2 * r.span() - 1).view({length, length});
}

/// [rows, heads * size] -> [heads, rows, size].
at::Tensor by_head(const at::Tensor& x, int64_t heads) {
  return x.view({x.size(0), heads, -1}).transpose(0, 1);
}

/// Products of each row of x with the embeddings that `rows` picks: [heads, x rows, rows' columns].
at::Tensor picked_products(const at::Tensor& x, const at::Tensor& embeddings,
                           const at::Tensor& rows) {
  const at::Tensor all = at::bmm(x, embeddings.transpose(1, 2));
  return all.gather(2, rows.unsqueeze(0).expand({x.size(0), -1, -1}));
}

}  // namespace

at::Tensor disentangled_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& position_key, const at::Tensor& position_query,
                                  const RelativePositions& relative, int64_t sequences,
                                  int64_t heads, const at::Tensor& visible) {
  const int64_t length = q.size(0) / sequences, size = q.size(1) / heads;
  const int terms = 1 + position_key.defined() + position_query.defined();
  const double scale = 1 / std::sqrt(static_cast<double>(size * terms));
  const at::Tensor buckets = distance_buckets(relative, length).to(q.device());
  const at::Tensor key_rows = embedding_rows(relative, buckets, false);
  const at::Tensor query_rows = embedding_rows(relative, buckets, true);
  std::vector<at::Tensor> out;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t keys = visible.defined() ? visible.const_data_ptr<int64_t>()[s] : length;
    const at::Tensor queries = by_head(q.narrow(0, s * length, length), heads);
    const at::Tensor seen = by_head(k.narrow(0, s * length, keys), heads);
    at::Tensor scores = at::bmm(queries, seen.transpose(1, 2));
    if (position_key.defined())
      scores = scores +
               picked_products(queries, by_head(position_key, heads), key_rows.narrow(1, 0, keys));
    if (position_query.defined())
      scores = scores +
               picked_products(seen, by_head(position_query, heads), query_rows.narrow(0, 0, keys))
                   .transpose(1, 2);
    const at::Tensor weights = at::softmax(scores * scale, 2, at::kFloat).to(q.scalar_type());
    const at::Tensor values = by_head(v.narrow(0, s * length, keys), heads);
    out.push_back(at::bmm(weights, values).transpose(0, 1).reshape({length, heads * size}));
  }
  return at::cat(out);
}

}  // namespace espalier::model
