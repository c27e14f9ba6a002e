#include "pipeline/model/kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "pipeline/model/kernels.cpp"
// The order matters to Highway.
// clang-format off
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
// clang-format on

#ifndef ESPALIER_MODEL_KERNELS_TABLE
#define ESPALIER_MODEL_KERNELS_TABLE
namespace espalier::model::kernels {

/// The kernels of one storage, as the processor's best target compiles them.
template <class T>
struct Table {
  // [1]: the weight is stored minus 1.
  void (*rms_norm[2])(const T*, const T*, int64_t, int64_t, float, T*, float*);
  void (*rms_norm_backward[2])(const T*, const T*, const T*, const float*, int64_t, int64_t, T*);
  void (*silu_times)(const T*, const T*, int64_t, T*);
  void (*silu_times_backward)(const T*, const T*, const T*, int64_t, T*, T*);
  void (*rotate_heads)(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                       const float*, float, T*);
  void (*unrotate_heads)(const float*, int64_t, int64_t, int64_t, int64_t, const float*,
                         const float*, float, T*, int64_t);
  void (*softmax_rows)(float*, int64_t, int64_t, const int64_t*, const int64_t*, T*, float*);
  void (*softmax_backward_rows)(const float*, const float*, int64_t, int64_t, const int64_t*,
                                const int64_t*, const float*, const float*, T*, T*, int64_t);
  void (*row_dots)(const T*, const T*, int64_t, int64_t, int64_t, float*);
  void (*column_square_sums)(const T*, int64_t, int64_t, float*);
  void (*add_to)(float*, const float*, int64_t);
};

}  // namespace espalier::model::kernels
#endif  // ESPALIER_MODEL_KERNELS_TABLE

HWY_BEFORE_NAMESPACE();
namespace espalier::model::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// bfloat16 lies in memory as uint16_t: the upper half of a float32, rounded to nearest even.
inline V load(D d, const float* p) { return hn::LoadU(d, p); }
inline V load(D d, const uint16_t* p) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> d16;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(d16, p))));
}
inline void store(D d, V v, float* p) { hn::StoreU(v, d, p); }
inline void store(D, V v, uint16_t* p) {
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> d16;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF))));
  // A NaN's payload must not round to infinity.
  const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(hn::RebindToSigned<decltype(du)>(),
                                           hn::IfThenElse(nan, quiet, rounded))),
             d16, p);
}
inline float as_float(float v) { return v; }
inline float as_float(uint16_t v) {
  const uint32_t bits = uint32_t{v} << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
inline void put(float v, float* p) { *p = v; }
inline void put(float v, uint16_t* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  *p = static_cast<uint16_t>(std::isnan(v) ? (bits >> 16 | 0x40)
                                           : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/// body(i) for every full vector, tail(i) for each element left over.
template <class Body, class Tail>
inline void sweep(int64_t n, const Body& body, const Tail& tail) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i);
  for (; i < n; ++i) tail(i);
}

/// A norm's factors; kFromOne: stored minus 1.
template <bool kFromOne, class T>
inline V gain(D d, const T* weight) {
  const V w = load(d, weight);
  if constexpr (kFromOne) return hn::Add(w, hn::Set(d, 1.0f));
  return w;
}
template <bool kFromOne, class T>
inline float gain(T weight) {
  return kFromOne ? 1.0f + as_float(weight) : as_float(weight);
}

template <bool kFromOne, class T>
void RmsNorm(const T* x, const T* weight, int64_t rows, int64_t n, float eps, T* y,
             float* inverse_rms) {
  const D d;
  for (int64_t row = 0; row < rows; ++row, x += n, y += n) {
    V sum = hn::Zero(d);
    float rest = 0;
    sweep(
        n,
        [&](int64_t i) {
          const V v = load(d, x + i);
          sum = hn::MulAdd(v, v, sum);
        },
        [&](int64_t i) { rest += as_float(x[i]) * as_float(x[i]); });
    const float mean = (hn::GetLane(hn::SumOfLanes(d, sum)) + rest) / static_cast<float>(n);
    const float r = 1.0f / std::sqrt(mean + eps);
    if (inverse_rms != nullptr) inverse_rms[row] = r;
    const V scale = hn::Set(d, r);
    sweep(
        n,
        [&](int64_t i) {
          store(d, hn::Mul(hn::Mul(load(d, x + i), scale), gain<kFromOne>(d, weight + i)), y + i);
        },
        [&](int64_t i) { put(as_float(x[i]) * r * gain<kFromOne>(weight[i]), y + i); });
  }
}

template <bool kFromOne, class T>
void RmsNormBackward(const T* x, const T* weight, const T* dy, const float* inverse_rms,
                     int64_t rows, int64_t n, T* dx) {
  const D d;
  for (int64_t row = 0; row < rows; ++row, x += n, dy += n, dx += n) {
    V sum = hn::Zero(d);
    float rest = 0;
    sweep(
        n,
        [&](int64_t i) {
          const V g = hn::Mul(load(d, dy + i), gain<kFromOne>(d, weight + i));
          sum = hn::MulAdd(g, load(d, x + i), sum);
        },
        [&](int64_t i) { rest += as_float(dy[i]) * gain<kFromOne>(weight[i]) * as_float(x[i]); });
    const float r = inverse_rms[row];
    const float dot = hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
    const float along = -r * r * r * dot / static_cast<float>(n);
    const V vr = hn::Set(d, r), va = hn::Set(d, along);
    sweep(
        n,
        [&](int64_t i) {
          const V g = hn::Mul(hn::Mul(load(d, dy + i), gain<kFromOne>(d, weight + i)), vr);
          store(d, hn::MulAdd(load(d, x + i), va, g), dx + i);
        },
        [&](int64_t i) {
          put(as_float(dy[i]) * gain<kFromOne>(weight[i]) * r + as_float(x[i]) * along, dx + i);
        });
  }
}

inline V sigmoid(D d, V x) {
  const V one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, hn::Exp(d, hn::Neg(x))));
}
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

template <class T>
void SiluTimes(const T* gate, const T* up, int64_t n, T* y) {
  const D d;
  sweep(
      n,
      [&](int64_t i) {
        const V g = load(d, gate + i);
        store(d, hn::Mul(hn::Mul(g, sigmoid(d, g)), load(d, up + i)), y + i);
      },
      [&](int64_t i) {
        const float g = as_float(gate[i]);
        put(g * sigmoid(g) * as_float(up[i]), y + i);
      });
}

template <class T>
void SiluTimesBackward(const T* gate, const T* up, const T* dy, int64_t n, T* dgate, T* dup) {
  const D d;
  const V one = hn::Set(d, 1.0f);
  sweep(
      n,
      [&](int64_t i) {
        const V g = load(d, gate + i), u = load(d, up + i), t = load(d, dy + i);
        const V s = sigmoid(d, g);
        store(d, hn::Mul(t, hn::Mul(g, s)), dup + i);
        // d silu = s (1 + g (1 - s))
        const V slope = hn::Mul(s, hn::MulAdd(g, hn::Sub(one, s), one));
        store(d, hn::Mul(hn::Mul(t, u), slope), dgate + i);
      },
      [&](int64_t i) {
        const float g = as_float(gate[i]), u = as_float(up[i]), t = as_float(dy[i]);
        const float s = sigmoid(g);
        put(t * g * s, dup + i);
        put(t * u * s * (1 + g * (1 - s)), dgate + i);
      });
}

/// One head of one token; direction +1 rotates, -1 turns back.
template <class From, class To>
inline void Turn(const From* x, int64_t size, int64_t rotated, const float* cosine,
                 const float* sine, float direction, float scale, To* y) {
  const D d;
  const int64_t half = rotated / 2;
  const V vscale = hn::Set(d, scale), vdirection = hn::Set(d, direction);
  sweep(
      half,
      [&](int64_t i) {
        const V c = hn::Mul(load(d, cosine + i), vscale);
        const V s = hn::Mul(hn::Mul(load(d, sine + i), vscale), vdirection);
        const V a = load(d, x + i), b = load(d, x + half + i);
        store(d, hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), y + i);
        store(d, hn::Add(hn::Mul(b, c), hn::Mul(a, s)), y + half + i);
      },
      [&](int64_t i) {
        const float c = cosine[i] * scale, s = sine[i] * scale * direction;
        const float a = as_float(x[i]), b = as_float(x[half + i]);
        put(a * c - b * s, y + i);
        put(b * c + a * s, y + half + i);
      });
  sweep(
      size - rotated,
      [&](int64_t i) { store(d, hn::Mul(load(d, x + rotated + i), vscale), y + rotated + i); },
      [&](int64_t i) { put(as_float(x[rotated + i]) * scale, y + rotated + i); });
}

template <class T>
void RotateHeads(const T* x, int64_t stride, int64_t tokens, int64_t heads, int64_t size,
                 int64_t rotated, const float* cosine, const float* sine, float scale, T* y) {
  if (cosine == nullptr) rotated = 0;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < tokens; ++token)
      Turn(x + token * stride + head * size, size, rotated, cosine + token * (rotated / 2),
           sine + token * (rotated / 2), 1.0f, scale, y + (head * tokens + token) * size);
}

template <class T>
void UnrotateHeads(const float* y, int64_t tokens, int64_t heads, int64_t size, int64_t rotated,
                   const float* cosine, const float* sine, float scale, T* x, int64_t stride) {
  if (cosine == nullptr) rotated = 0;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t token = 0; token < tokens; ++token)
      Turn(y + (head * tokens + token) * size, size, rotated, cosine + token * (rotated / 2),
           sine + token * (rotated / 2), -1.0f, scale, x + token * stride + head * size);
}

template <class T>
void Fill(T* p, int64_t n) {
  std::fill(p, p + n, T{0});
}

template <class T>
void SoftmaxRows(float* scores, int64_t rows, int64_t columns, const int64_t* first,
                 const int64_t* last, T* probabilities, float* log_sum_exp) {
  const D d;
  for (int64_t row = 0; row < rows; ++row, scores += columns, probabilities += columns) {
    const int64_t begin = first[row], n = last[row] - begin;
    float* s = scores + begin;
    V top = hn::Set(d, -std::numeric_limits<float>::infinity());
    float largest = -std::numeric_limits<float>::infinity();
    sweep(
        n, [&](int64_t i) { top = hn::Max(top, load(d, s + i)); },
        [&](int64_t i) { largest = std::max(largest, s[i]); });
    largest = std::max(largest, hn::GetLane(hn::MaxOfLanes(d, top)));
    const V shift = hn::Set(d, largest);
    V total = hn::Zero(d);
    float rest = 0;
    sweep(
        n,
        [&](int64_t i) {
          const V e = hn::Exp(d, hn::Sub(load(d, s + i), shift));
          hn::StoreU(e, d, s + i);
          total = hn::Add(total, e);
        },
        [&](int64_t i) { rest += s[i] = std::exp(s[i] - largest); });
    const float sum = hn::GetLane(hn::SumOfLanes(d, total)) + rest;
    if (log_sum_exp != nullptr) log_sum_exp[row] = largest + std::log(sum);
    const V inverse = hn::Set(d, 1.0f / sum);
    Fill(probabilities, begin);
    sweep(
        n,
        [&](int64_t i) { store(d, hn::Mul(load(d, s + i), inverse), probabilities + begin + i); },
        [&](int64_t i) { put(s[i] * (1.0f / sum), probabilities + begin + i); });
    Fill(probabilities + begin + n, columns - begin - n);
  }
}

template <class T>
void SoftmaxBackwardRows(const float* scores, const float* dp, int64_t rows, int64_t columns,
                         const int64_t* first, const int64_t* last, const float* log_sum_exp,
                         const float* row_dot, T* p, T* ds, int64_t stride) {
  const D d;
  for (int64_t row = 0; row < rows;
       ++row, scores += columns, dp += columns, p += stride, ds += stride) {
    const int64_t begin = first[row], end = last[row];
    const V shift = hn::Set(d, log_sum_exp[row]), dot = hn::Set(d, row_dot[row]);
    Fill(p, begin);
    Fill(ds, begin);
    sweep(
        end - begin,
        [&](int64_t i) {
          const V e = hn::Exp(d, hn::Sub(load(d, scores + begin + i), shift));
          store(d, e, p + begin + i);
          store(d, hn::Mul(e, hn::Sub(load(d, dp + begin + i), dot)), ds + begin + i);
        },
        [&](int64_t i) {
          const float e = std::exp(scores[begin + i] - log_sum_exp[row]);
          put(e, p + begin + i);
          put(e * (dp[begin + i] - row_dot[row]), ds + begin + i);
        });
    Fill(p + end, columns - end);
    Fill(ds + end, columns - end);
  }
}

template <class T>
void RowDots(const T* a, const T* b, int64_t rows, int64_t n, int64_t stride, float* dot) {
  const D d;
  for (int64_t row = 0; row < rows; ++row, a += stride, b += stride) {
    V sum = hn::Zero(d);
    float rest = 0;
    sweep(
        n, [&](int64_t i) { sum = hn::MulAdd(load(d, a + i), load(d, b + i), sum); },
        [&](int64_t i) { rest += as_float(a[i]) * as_float(b[i]); });
    dot[row] = hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
  }
}

template <class T>
void ColumnSquareSums(const T* x, int64_t rows, int64_t n, float* sums) {
  const D d;
  std::fill(sums, sums + n, 0.0f);
  for (int64_t row = 0; row < rows; ++row, x += n)
    sweep(
        n,
        [&](int64_t i) {
          const V v = load(d, x + i);
          store(d, hn::MulAdd(v, v, load(d, sums + i)), sums + i);
        },
        [&](int64_t i) { sums[i] += as_float(x[i]) * as_float(x[i]); });
}

void AddTo(float* total, const float* addend, int64_t n) {
  const D d;
  sweep(
      n, [&](int64_t i) { store(d, hn::Add(load(d, total + i), load(d, addend + i)), total + i); },
      [&](int64_t i) { total[i] += addend[i]; });
}

template <class T>
Table<T> MakeTable() {
  return {{RmsNorm<false, T>, RmsNorm<true, T>},
          {RmsNormBackward<false, T>, RmsNormBackward<true, T>},
          SiluTimes<T>,
          SiluTimesBackward<T>,
          RotateHeads<T>,
          UnrotateHeads<T>,
          SoftmaxRows<T>,
          SoftmaxBackwardRows<T>,
          RowDots<T>,
          ColumnSquareSums<T>,
          AddTo};
}

void FillTables(Table<float>* f, Table<uint16_t>* b) {
  *f = MakeTable<float>();
  *b = MakeTable<uint16_t>();
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::model::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::model::kernels {
namespace {

HWY_EXPORT(FillTables);

struct Tables {
  Table<float> f;
  Table<uint16_t> b;
};
const Tables& tables() {
  static const Tables filled = [] {
    Tables t;
    HWY_DYNAMIC_DISPATCH(FillTables)(&t.f, &t.b);
    return t;
  }();
  return filled;
}

/// Calls body(functions, cast) for the storage; cast turns void pointers into the storage's.
template <class Body>
void with(Storage storage, const Body& body) {
  if (storage == Storage::float32)
    body(tables().f, float{});
  else
    body(tables().b, uint16_t{});
}
template <class T>
const T* in(const void* p, T) {
  return static_cast<const T*>(p);
}
template <class T>
T* out(void* p, T) {
  return static_cast<T*>(p);
}

}  // namespace

void rms_norm(Storage storage, const void* x, const void* weight, bool from_one, int64_t rows,
              int64_t n, float eps, void* y, float* inverse_rms) {
  with(storage, [&](const auto& f, auto t) {
    f.rms_norm[from_one](in(x, t), in(weight, t), rows, n, eps, out(y, t), inverse_rms);
  });
}

void rms_norm_backward(Storage storage, const void* x, const void* weight, bool from_one,
                       const void* dy, const float* inverse_rms, int64_t rows, int64_t n,
                       void* dx) {
  with(storage, [&](const auto& f, auto t) {
    f.rms_norm_backward[from_one](in(x, t), in(weight, t), in(dy, t), inverse_rms, rows, n,
                                  out(dx, t));
  });
}

void silu_times(Storage storage, const void* gate, const void* up, int64_t n, void* y) {
  with(storage, [&](const auto& f, auto t) { f.silu_times(in(gate, t), in(up, t), n, out(y, t)); });
}

void silu_times_backward(Storage storage, const void* gate, const void* up, const void* dy,
                         int64_t n, void* dgate, void* dup) {
  with(storage, [&](const auto& f, auto t) {
    f.silu_times_backward(in(gate, t), in(up, t), in(dy, t), n, out(dgate, t), out(dup, t));
  });
}

void rotate_heads(Storage storage, const void* x, int64_t stride, int64_t tokens, int64_t heads,
                  int64_t size, int64_t rotated, const float* cosine, const float* sine,
                  float scale, void* y) {
  with(storage, [&](const auto& f, auto t) {
    f.rotate_heads(in(x, t), stride, tokens, heads, size, rotated, cosine, sine, scale, out(y, t));
  });
}

void unrotate_heads(Storage storage, const float* y, int64_t tokens, int64_t heads, int64_t size,
                    int64_t rotated, const float* cosine, const float* sine, float scale, void* x,
                    int64_t stride) {
  with(storage, [&](const auto& f, auto t) {
    f.unrotate_heads(y, tokens, heads, size, rotated, cosine, sine, scale, out(x, t), stride);
  });
}

void softmax_rows(Storage storage, float* scores, int64_t rows, int64_t columns,
                  const int64_t* first, const int64_t* last, void* probabilities,
                  float* log_sum_exp) {
  with(storage, [&](const auto& f, auto t) {
    f.softmax_rows(scores, rows, columns, first, last, out(probabilities, t), log_sum_exp);
  });
}

void softmax_backward_rows(Storage storage, const float* scores, const float* d_probabilities,
                           int64_t rows, int64_t columns, const int64_t* first, const int64_t* last,
                           const float* log_sum_exp, const float* row_dot, void* probabilities,
                           void* d_scores, int64_t stride) {
  with(storage, [&](const auto& f, auto t) {
    f.softmax_backward_rows(scores, d_probabilities, rows, columns, first, last, log_sum_exp,
                            row_dot, out(probabilities, t), out(d_scores, t), stride);
  });
}

void row_dots(Storage storage, const void* a, const void* b, int64_t rows, int64_t n,
              int64_t stride, float* dot) {
  with(storage,
       [&](const auto& f, auto t) { f.row_dots(in(a, t), in(b, t), rows, n, stride, dot); });
}

void column_square_sums(Storage storage, const void* x, int64_t rows, int64_t n, float* sums) {
  with(storage, [&](const auto& f, auto t) { f.column_square_sums(in(x, t), rows, n, sums); });
}

void add_to(float* total, const float* addend, int64_t n) { tables().f.add_to(total, addend, n); }

}  // namespace espalier::model::kernels
#endif  // HWY_ONCE
