#include "pipeline/model/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "pipeline/linalg/product.h"
#include "pipeline/model/kernels.h"
#include "pipeline/model/short_attention.h"
#include "pipeline/model/visibility.h"

namespace espalier::model {
namespace {

using kernels::Storage;

constexpr int64_t kTile = 128;  // queries of a tile; scores of a tile stay in cache

Storage storage_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? Storage::float32 : Storage::bfloat16;
}
const float* floats(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

/// Heads of one sequence, rotated and gathered: [heads, length, size].
at::Tensor gather_heads(const at::Tensor& x, int64_t heads, const AttentionShape& s, bool turn,
                        const at::Tensor& cosine, const at::Tensor& sine, float scale) {
  at::Tensor y = at::empty({heads, x.size(0), s.head_size}, x.options());
  kernels::rotate_heads(storage_of(x), x.const_data_ptr(), x.stride(0), x.size(0), heads,
                        s.head_size, turn ? s.rotated : 0, turn ? floats(cosine) : nullptr,
                        turn ? floats(sine) : nullptr, scale, y.data_ptr());
  return y;
}

struct Sequence {
  at::Tensor q, k, v;  // [heads, length, size], q scaled by 1/sqrt(size)

  Sequence(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
           const at::Tensor& cosine, const at::Tensor& sine, const AttentionShape& s)
      : q(gather_heads(q_in, s.heads, s, true, cosine, sine,
                       1.0f / std::sqrt(static_cast<float>(s.head_size)))),
        k(gather_heads(k_in, s.key_value_heads, s, true, cosine, sine, 1.0f)),
        v(gather_heads(v_in, s.key_value_heads, s, false, cosine, sine, 1.0f)) {}
};

/// One sequence; log_sum_exp [heads, length] float32 is filled when defined.
void forward_sequence(const Sequence& x, const Visibility& sees, const AttentionShape& s,
                      at::Tensor& out, at::Tensor& log_sum_exp) {
  const int64_t length = x.q.size(1), group = s.heads / s.key_value_heads;
  const auto options = x.q.options();
  at::Tensor scores = at::empty({kTile * length}, options.dtype(at::kFloat));
  at::Tensor weights = at::empty({kTile * length}, options);
  for (int64_t head = 0; head < s.heads; ++head) {
    const at::Tensor q = x.q[head], k = x.k[head / group], v = x.v[head / group];
    for (int64_t first = 0; first < length; first += kTile) {
      const int64_t rows = std::min(kTile, length - first);
      const int64_t keys = sees.last[first + rows - 1];
      at::Tensor tile = scores.narrow(0, 0, rows * keys).view({rows, keys});
      at::Tensor share = weights.narrow(0, 0, rows * keys).view({rows, keys});
      linalg::product_into(tile, q.narrow(0, first, rows), k.narrow(0, 0, keys).t());
      kernels::softmax_rows(
          storage_of(out), tile.data_ptr<float>(), rows, keys, sees.first.data() + first,
          sees.last.data() + first, share.data_ptr(),
          log_sum_exp.defined() ? log_sum_exp.data_ptr<float>() + head * length + first : nullptr);
      at::Tensor target = out.narrow(0, first, rows).narrow(1, head * s.head_size, s.head_size);
      linalg::product_into(target, share, v.narrow(0, 0, keys));
    }
  }
}

/// Gradients of one head's probabilities and scores, [length, length] in storage, zero where
/// unseen.
void backward_scores(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& d_out, const float* log_sum_exp, const float* row_dot,
                     const Visibility& sees, at::Tensor& probabilities, at::Tensor& d_scores) {
  const int64_t length = q.size(0);
  at::Tensor scores = at::empty({kTile * length}, q.options().dtype(at::kFloat));
  at::Tensor d_prob = at::empty_like(scores);
  for (int64_t first = 0; first < length; first += kTile) {
    const int64_t rows = std::min(kTile, length - first);
    const int64_t keys = sees.last[first + rows - 1];
    at::Tensor s = scores.narrow(0, 0, rows * keys).view({rows, keys});
    at::Tensor dp = d_prob.narrow(0, 0, rows * keys).view({rows, keys});
    linalg::product_into(s, q.narrow(0, first, rows), k.narrow(0, 0, keys).t());
    linalg::product_into(dp, d_out.narrow(0, first, rows), v.narrow(0, 0, keys).t());
    at::Tensor p_rows = probabilities.narrow(0, first, rows),
               ds_rows = d_scores.narrow(0, first, rows);
    kernels::softmax_backward_rows(storage_of(q), s.data_ptr<float>(), dp.data_ptr<float>(), rows,
                                   keys, sees.first.data() + first, sees.last.data() + first,
                                   log_sum_exp + first, row_dot + first, p_rows.data_ptr(),
                                   ds_rows.data_ptr(), length);
  }
}

struct HeadGradients {
  at::Tensor q, k, v;  // float32 [heads, length, size]
};

/// dQ by query tiles, dK and dV by key tiles, each skipping what the mask hides.
void backward_products(const at::Tensor& q, const at::Tensor& k, const at::Tensor& d_out,
                       const at::Tensor& p, const at::Tensor& ds, const Visibility& sees,
                       bool causal, int64_t head, int64_t key_head, HeadGradients& d) {
  const int64_t length = q.size(0);
  at::Tensor part = at::empty({kTile, q.size(1)}, q.options().dtype(at::kFloat));
  for (int64_t first = 0; first < length; first += kTile) {
    const int64_t rows = std::min(kTile, length - first);
    const int64_t keys = sees.last[first + rows - 1];
    at::Tensor dq = d.q[head].narrow(0, first, rows);
    linalg::product_into(dq, ds.narrow(0, first, rows).narrow(1, 0, keys), k.narrow(0, 0, keys));
    // Queries that can see these keys: those from `first` on when causal.
    const int64_t from = causal ? first : 0;
    at::Tensor tile = part.narrow(0, 0, rows);
    const auto add = [&](const at::Tensor& weights, const at::Tensor& rows_of, at::Tensor& total) {
      linalg::product_into(tile, weights.narrow(0, from, length - from).narrow(1, first, rows).t(),
                           rows_of.narrow(0, from, length - from));
      kernels::add_to(total[key_head].data_ptr<float>() + first * q.size(1), tile.data_ptr<float>(),
                      rows * q.size(1));
    };
    add(p, d_out, d.v);
    add(ds, q, d.k);
  }
}

/// An undefined tensor is no argument of an autograd function; an absent one is.
std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional(t) : std::nullopt;
}

struct CpuAttention : torch::autograd::Function<CpuAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& given_cosine,
                            const std::optional<at::Tensor>& given_sine, int64_t sequences,
                            const AttentionShape& shape,
                            const std::optional<at::Tensor>& given_visible) {
    const at::AutoDispatchBelowADInplaceOrView cheap_views;  // thousands of them, none recorded
    const at::Tensor cosine = given_cosine.value_or(at::Tensor());
    const at::Tensor sine = given_sine.value_or(at::Tensor());
    const at::Tensor visible = given_visible.value_or(at::Tensor());
    const int64_t length = q.size(0) / sequences;
    at::Tensor out = at::empty_like(q);
    at::Tensor log_sum_exp =
        at::empty({sequences, shape.heads, length}, q.options().dtype(at::kFloat));
    run(q, k, v, cosine, sine, sequences, shape, visible, out, log_sum_exp);
    context->save_for_backward({q, k, v, cosine, sine, visible, out, log_sum_exp});
    context->saved_data["sequences"] = sequences;
    context->saved_data["shape"] = pack(shape);
    return out;
  }

  static void run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences,
                  const AttentionShape& shape, const at::Tensor& visible, at::Tensor& out,
                  at::Tensor& log_sum_exp) {
    const int64_t length = q.size(0) / sequences;
    if (length <= kShortSequence)
      return short_attention(q, k, v, cosine, sine, sequences, shape, visible, out, log_sum_exp);
    for (int64_t i = 0; i < sequences; ++i) {
      const auto rows = [&](const at::Tensor& t) { return t.narrow(0, i * length, length); };
      const Sequence x(rows(q), rows(k), rows(v), cosine, sine, shape);
      at::Tensor target = rows(out);
      at::Tensor statistics = log_sum_exp.defined() ? log_sum_exp[i] : at::Tensor();
      forward_sequence(x, Visibility(length, visible_of(visible, i, length), shape), shape, target,
                       statistics);
    }
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const at::AutoDispatchBelowADInplaceOrView cheap_views;
    const auto saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &cosine = saved[3],
                     &sine = saved[4], &visible = saved[5], &out = saved[6], &lse = saved[7];
    const AttentionShape shape = unpack(context->saved_data["shape"].toIntVector());
    const int64_t sequences = context->saved_data["sequences"].toInt();
    const int64_t length = q.size(0) / sequences;
    const at::Tensor d_out = gradients[0].contiguous();
    if (length <= kShortSequence) {
      const AttentionGradients d = short_attention_backward(q, k, v, cosine, sine, sequences, shape,
                                                            visible, out, d_out, lse);
      return {d.q, d.k, d.v, {}, {}, {}, {}, {}};
    }
    at::Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
    for (int64_t i = 0; i < sequences; ++i) {
      const auto rows = [&](const at::Tensor& t) { return t.narrow(0, i * length, length); };
      const Sequence x(rows(q), rows(k), rows(v), cosine, sine, shape);
      const Visibility sees(length, visible_of(visible, i, length), shape);
      const HeadGradients d = backward_sequence(x, sees, shape, rows(out), rows(d_out), lse[i]);
      at::Tensor tq = rows(dq), tk = rows(dk), tv = rows(dv);
      scatter(d.q, true, shape, cosine, sine, 1.0f / std::sqrt(static_cast<float>(shape.head_size)),
              tq);
      scatter(d.k, true, shape, cosine, sine, 1.0f, tk);
      scatter(d.v, false, shape, cosine, sine, 1.0f, tv);
    }
    return {dq, dk, dv, {}, {}, {}, {}, {}};
  }

 private:
  static HeadGradients backward_sequence(const Sequence& x, const Visibility& sees,
                                         const AttentionShape& s, const at::Tensor& out,
                                         const at::Tensor& d_out, const at::Tensor& lse) {
    const int64_t length = x.q.size(1), group = s.heads / s.key_value_heads;
    const auto options = x.q.options().dtype(at::kFloat);
    HeadGradients d{at::empty(x.q.sizes(), options), at::zeros(x.k.sizes(), options),
                    at::zeros(x.v.sizes(), options)};
    // Columns that no query sees are never written: they must not carry what memory held.
    at::Tensor p = sees.last.back() < length ? at::zeros({length, length}, x.q.options())
                                             : at::empty({length, length}, x.q.options());
    at::Tensor ds = sees.last.back() < length ? at::zeros_like(p) : at::empty_like(p);
    at::Tensor row_dot = at::empty({length}, options);
    for (int64_t head = 0; head < s.heads; ++head) {
      const int64_t key_head = head / group, column = head * s.head_size;
      const at::Tensor q = x.q[head], k = x.k[key_head], v = x.v[key_head];
      const at::Tensor d_head = d_out.narrow(1, column, s.head_size).contiguous();
      const at::Tensor out_head = out.narrow(1, column, s.head_size).contiguous();
      kernels::row_dots(storage_of(q), out_head.const_data_ptr(), d_head.const_data_ptr(), length,
                        s.head_size, s.head_size, row_dot.data_ptr<float>());
      backward_scores(q, k, v, d_head, lse.const_data_ptr<float>() + head * length,
                      row_dot.const_data_ptr<float>(), sees, p, ds);
      backward_products(q, k, d_head, p, ds, sees, s.causal, head, key_head, d);
    }
    return d;
  }

  static void scatter(const at::Tensor& gradient, bool turn, const AttentionShape& s,
                      const at::Tensor& cosine, const at::Tensor& sine, float scale,
                      at::Tensor& out) {
    kernels::unrotate_heads(storage_of(out), gradient.const_data_ptr<float>(), gradient.size(1),
                            gradient.size(0), s.head_size, turn ? s.rotated : 0,
                            turn ? floats(cosine) : nullptr, turn ? floats(sine) : nullptr, scale,
                            out.data_ptr(), out.stride(0));
  }

  static std::vector<int64_t> pack(const AttentionShape& s) {
    return {s.heads,  s.key_value_heads, s.head_size, s.causal, s.sliding_window.value_or(0),
            s.rotated};
  }
  static AttentionShape unpack(const std::vector<int64_t>& v) {
    AttentionShape s{v[0], v[1], v[2], v[3] != 0, {}, v[5]};
    if (v[4] > 0) s.sliding_window = v[4];
    return s;
  }
};

/// Other devices: ATen's fused attention over the same arithmetic.
at::Tensor device_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences,
                            const AttentionShape& s, const at::Tensor& visible) {
  const int64_t length = q.size(0) / sequences;
  const auto heads = [&](const at::Tensor& x, int64_t count, bool turn) {
    at::Tensor y = x.view({sequences, length, count, s.head_size}).transpose(1, 2);
    if (!turn || s.rotated == 0) return y;
    const at::Tensor c = at::cat({cosine, cosine}, 1).to(y.scalar_type());
    const at::Tensor n = at::cat({sine, sine}, 1).to(y.scalar_type());
    const at::Tensor turned = y.narrow(3, 0, s.rotated);
    const auto halves = turned.chunk(2, 3);
    const at::Tensor rotated = turned * c + at::cat({-halves[1], halves[0]}, 3) * n;
    return s.rotated == s.head_size
               ? rotated
               : at::cat({rotated, y.narrow(3, s.rotated, s.head_size - s.rotated)}, 3);
  };
  const auto index = at::arange(length, q.options().dtype(at::kLong));
  at::Tensor seen = at::ones({length, length}, q.options().dtype(at::kBool));
  if (s.causal) seen = index.unsqueeze(1) >= index;
  if (s.sliding_window) seen = seen & (index.unsqueeze(1) - index < *s.sliding_window);
  seen = seen.expand({sequences, 1, length, length});
  if (visible.defined())
    seen = seen & (index.view({1, 1, 1, length}) < visible.to(q.device()).view({-1, 1, 1, 1}));
  const int64_t group = s.heads / s.key_value_heads;
  const auto repeat = [&](const at::Tensor& x) { return x.repeat_interleave(group, 1); };
  return at::scaled_dot_product_attention(heads(q, s.heads, true),
                                          repeat(heads(k, s.key_value_heads, true)),
                                          repeat(heads(v, s.key_value_heads, false)), seen)
      .transpose(1, 2)
      .reshape({sequences * length, s.heads * s.head_size});
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& cosine, const at::Tensor& sine, int64_t sequences,
                     const AttentionShape& shape, const at::Tensor& visible) {
  if (!q.is_cpu()) return device_attention(q, k, v, cosine, sine, sequences, shape, visible);
  if (q.requires_grad() || k.requires_grad() || v.requires_grad())
    return CpuAttention::apply(q, k, v, if_defined(cosine), if_defined(sine), sequences, shape,
                               if_defined(visible));
  at::Tensor out = at::empty_like(q), none;
  CpuAttention::run(q, k, v, cosine, sine, sequences, shape, visible, out, none);
  return out;
}

}  // namespace espalier::model
