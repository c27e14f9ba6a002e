#include "pipeline/model/short_attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "pipeline/linalg/product.h"
#include "pipeline/model/kernels.h"
#include "pipeline/model/visibility.h"

namespace espalier::model {
namespace {

using kernels::Storage;

constexpr int64_t kScores = 1 << 20;  // of the sequences that go together; they stay in cache

Storage storage_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? Storage::float32 : Storage::bfloat16;
}

/// Sequences [begin, begin + count) of a unit, and how their heads are gathered and scattered.
struct Chunk {
  const AttentionShape& shape;
  const at::Tensor &cosine, &sine;
  int64_t begin, count, length;

  int64_t group() const { return shape.heads / shape.key_value_heads; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape.head_size)); }
  const float* angles(const at::Tensor& table, bool turn) const {
    return turn && shape.rotated > 0 ? table.const_data_ptr<float>() : nullptr;
  }

  /// x [tokens, heads * size] of the unit -> [count * shape.heads, length, size]; heads that
  /// queries share are repeated.
  at::Tensor gather(const at::Tensor& x, int64_t heads, bool turn, float factor) const {
    at::Tensor y = at::empty({count, heads, length, shape.head_size}, x.options());
    for (int64_t i = 0; i < count; ++i) {
      const at::Tensor from = x.narrow(0, (begin + i) * length, length);
      kernels::rotate_heads(storage_of(x), from.const_data_ptr(), x.stride(0), length, heads,
                            shape.head_size, turn ? shape.rotated : 0, angles(cosine, turn),
                            angles(sine, turn), factor, y[i].data_ptr());
    }
    if (heads < shape.heads) y = y.repeat_interleave(group(), 1);
    return y.view({count * shape.heads, length, shape.head_size});
  }

  /// The transpose: y float32 [count * shape.heads, length, size] -> rows of x; shared heads add
  /// up.
  void scatter(at::Tensor y, int64_t heads, bool turn, float factor, at::Tensor& x) const {
    y = y.view({count, heads, shape.heads / heads, length, shape.head_size});
    y = heads < shape.heads ? y.sum(2) : y.squeeze(2);
    for (int64_t i = 0; i < count; ++i) {
      at::Tensor to = x.narrow(0, (begin + i) * length, length);
      kernels::unrotate_heads(storage_of(x), y[i].const_data_ptr<float>(), length, heads,
                              shape.head_size, turn ? shape.rotated : 0, angles(cosine, turn),
                              angles(sine, turn), factor, to.data_ptr(), x.stride(0));
    }
  }
  at::Tensor queries(const at::Tensor& q) const { return gather(q, shape.heads, true, scale()); }
  at::Tensor keys(const at::Tensor& k) const {
    return gather(k, shape.key_value_heads, true, 1.0f);
  }
  at::Tensor values(const at::Tensor& v) const {
    return gather(v, shape.key_value_heads, false, 1.0f);
  }
  int64_t rows() const { return count * shape.heads * length; }
};

/// By row of a chunk's scores.
Visibility visibility_of(const Chunk& c, const at::Tensor& visible) {
  Visibility all(0, 0, c.shape);
  for (int64_t i = 0; i < c.count; ++i) {
    const Visibility one(c.length, visible_of(visible, c.begin + i, c.length), c.shape);
    for (int64_t head = 0; head < c.shape.heads; ++head) {
      all.first.insert(all.first.end(), one.first.begin(), one.first.end());
      all.last.insert(all.last.end(), one.last.begin(), one.last.end());
    }
  }
  return all;
}

at::Tensor batched(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options().dtype(at::kFloat));
  linalg::batched_product_into(out, a, b);
  return out;
}

template <class Work>
void for_chunks(const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences, int64_t length,
                const AttentionShape& shape, const Work& work) {
  const int64_t most = std::max<int64_t>(1, kScores / (shape.heads * length * length));
  for (int64_t begin = 0; begin < sequences; begin += most)
    work(Chunk{shape, cosine, sine, begin, std::min(most, sequences - begin), length});
}

}  // namespace

void short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences,
                     const AttentionShape& shape, const at::Tensor& visible, at::Tensor& out,
                     at::Tensor& log_sum_exp) {
  const int64_t length = q.size(0) / sequences;
  for_chunks(cosine, sine, sequences, length, shape, [&](const Chunk& c) {
    const Visibility sees = visibility_of(c, visible);
    at::Tensor scores = batched(c.queries(q), c.keys(k).transpose(1, 2));
    at::Tensor weights = at::empty(scores.sizes(), q.options());
    float* statistics = log_sum_exp.defined() ? log_sum_exp[c.begin].data_ptr<float>() : nullptr;
    kernels::softmax_rows(storage_of(q), scores.data_ptr<float>(), c.rows(), length,
                          sees.first.data(), sees.last.data(), weights.data_ptr(), statistics);
    c.scatter(batched(weights, c.values(v)), shape.heads, false, 1.0f, out);
  });
}

AttentionGradients short_attention_backward(const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& v, const at::Tensor& cosine,
                                            const at::Tensor& sine, int64_t sequences,
                                            const AttentionShape& shape, const at::Tensor& visible,
                                            const at::Tensor& out, const at::Tensor& d_out,
                                            const at::Tensor& log_sum_exp) {
  const int64_t length = q.size(0) / sequences;
  AttentionGradients d{at::empty_like(q), at::empty_like(k), at::empty_like(v)};
  for_chunks(cosine, sine, sequences, length, shape, [&](const Chunk& c) {
    const Visibility sees = visibility_of(c, visible);
    const at::Tensor queries = c.queries(q), keys = c.keys(k), values = c.values(v);
    const at::Tensor d_heads = c.gather(d_out, shape.heads, false, 1.0f);
    const at::Tensor heads = c.gather(out, shape.heads, false, 1.0f);
    at::Tensor row_dot = at::empty({c.rows()}, q.options().dtype(at::kFloat));
    kernels::row_dots(storage_of(q), heads.const_data_ptr(), d_heads.const_data_ptr(), c.rows(),
                      shape.head_size, shape.head_size, row_dot.data_ptr<float>());
    const at::Tensor scores = batched(queries, keys.transpose(1, 2));
    const at::Tensor d_weights = batched(d_heads, values.transpose(1, 2));
    at::Tensor weights = at::empty(scores.sizes(), q.options());
    at::Tensor d_scores = at::empty(scores.sizes(), q.options());
    kernels::softmax_backward_rows(
        storage_of(q), scores.const_data_ptr<float>(), d_weights.const_data_ptr<float>(), c.rows(),
        length, sees.first.data(), sees.last.data(), log_sum_exp[c.begin].const_data_ptr<float>(),
        row_dot.const_data_ptr<float>(), weights.data_ptr(), d_scores.data_ptr(), length);
    c.scatter(batched(d_scores, keys), shape.heads, true, c.scale(), d.q);
    c.scatter(batched(d_scores.transpose(1, 2), queries), shape.key_value_heads, true, 1.0f, d.k);
    c.scatter(batched(weights.transpose(1, 2), d_heads), shape.key_value_heads, false, 1.0f, d.v);
  });
  return d;
}

}  // namespace espalier::model
