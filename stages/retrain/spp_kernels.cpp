#include "stages/retrain/spp_kernels.h"

#include <algorithm>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "stages/retrain/spp_kernels.cpp"
#include <hwy/foreach_target.h>
// The order matters: highway.h is read once for every target.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace espalier::retrain {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using FloatVector = hn::Vec<FloatTag>;

float widen(uint16_t narrow) {
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t narrowed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float load_one(const float* from) { return *from; }
float load_one(const uint16_t* from) { return widen(*from); }
void store_one(float value, float* to) { *to = value; }
void store_one(float value, uint16_t* to) { *to = narrowed(value); }

FloatVector load(const float* from) { return hn::LoadU(FloatTag(), from); }

FloatVector load(const uint16_t* from) {
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::Rebind<uint16_t, FloatTag> dh;
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(dh, from))));
}

void store(FloatVector value, float* to) { hn::StoreU(value, FloatTag(), to); }

void store(FloatVector value, uint16_t* to) {
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::RebindToSigned<FloatTag> di;
  const hn::Rebind<uint16_t, FloatTag> dh;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(hn::Set(du, 0x7fffu), odd)));
  hn::StoreU(hn::DemoteTo(dh, hn::BitCast(di, rounded)), dh, to);
}

/// One row: out = w * (base + factor * alpha), alpha null for ones.
template <class T>
void effective_row(const T* w, const float* alpha, int64_t columns, float base, float factor,
                   T* out) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const FloatVector base_lanes = hn::Set(d, base), factor_lanes = hn::Set(d, factor);
  const FloatVector one = hn::Set(d, 1.0f);
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    const FloatVector a = alpha ? hn::LoadU(d, alpha + c) : one;
    store(hn::Mul(load(w + c), hn::Add(base_lanes, hn::Mul(factor_lanes, a))), out + c);
  }
  for (; c < columns; ++c) {
    const float grown = factor * (alpha ? alpha[c] : 1.0f);
    store_one(load_one(w + c) * (base + grown), out + c);
  }
}

/// One row: sums += factor * w * g (sums null: not wanted); returns sum of alpha * w * g.
template <class T>
float reduce_row(const T* w, const float* g, const float* alpha, int64_t columns, float factor,
                 float* sums) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const FloatVector factor_lanes = hn::Set(d, factor), one = hn::Set(d, 1.0f);
  FloatVector row = hn::Zero(d);
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) {
    const FloatVector product = hn::Mul(load(w + c), hn::LoadU(d, g + c));
    row = hn::Add(row, hn::Mul(alpha ? hn::LoadU(d, alpha + c) : one, product));
    if (sums)
      hn::StoreU(hn::Add(hn::LoadU(d, sums + c), hn::Mul(factor_lanes, product)), d, sums + c);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, row));
  for (; c < columns; ++c) {
    const float product = load_one(w + c) * g[c];
    total += (alpha ? alpha[c] : 1.0f) * product;
    if (sums) sums[c] += factor * product;
  }
  return total;
}

template <class T>
void effective_of(const SppMatrix& m, float base, float scale, T* out) {
  const auto* w = static_cast<const T*>(m.weights);
  const int64_t group_rows = m.rows / m.groups;
  for (int64_t i = 0; i < m.rows; ++i) {
    const float* alpha = m.alpha ? m.alpha + (i / group_rows) * m.columns : nullptr;
    const float factor = m.beta ? scale * m.beta[i] : scale;
    effective_row(w + i * m.columns, alpha, m.columns, base, factor, out + i * m.columns);
  }
}

template <class T>
void reduce_of(const SppMatrix& m, const float* g, float scale, float* alpha_gradient,
               float* beta_gradient) {
  const auto* w = static_cast<const T*>(m.weights);
  const int64_t group_rows = m.rows / m.groups;
  if (alpha_gradient) std::fill(alpha_gradient, alpha_gradient + m.groups * m.columns, 0.0f);
  for (int64_t i = 0; i < m.rows; ++i) {
    const int64_t at = (i / group_rows) * m.columns;
    const float factor = m.beta ? scale * m.beta[i] : scale;
    const float sum =
        reduce_row(w + i * m.columns, g + i * m.columns, m.alpha ? m.alpha + at : nullptr, m.columns,
                   factor, alpha_gradient ? alpha_gradient + at : nullptr);
    if (beta_gradient) beta_gradient[i] = scale * sum;
  }
}

void Effective(const SppMatrix& matrix, float base, float scale, void* out) {
  if (matrix.narrow)
    effective_of(matrix, base, scale, static_cast<uint16_t*>(out));
  else
    effective_of(matrix, base, scale, static_cast<float*>(out));
}

void Reduce(const SppMatrix& matrix, const float* gradient, float scale, float* alpha_gradient,
            float* beta_gradient) {
  if (matrix.narrow)
    reduce_of<uint16_t>(matrix, gradient, scale, alpha_gradient, beta_gradient);
  else
    reduce_of<float>(matrix, gradient, scale, alpha_gradient, beta_gradient);
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::retrain
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::retrain {

HWY_EXPORT(Effective);
HWY_EXPORT(Reduce);

void spp_effective(const SppMatrix& matrix, float base, float scale, void* out) {
  HWY_DYNAMIC_DISPATCH(Effective)(matrix, base, scale, out);
}

void spp_reduce(const SppMatrix& matrix, const float* gradient, float scale, float* alpha_gradient,
                float* beta_gradient) {
  HWY_DYNAMIC_DISPATCH(Reduce)(matrix, gradient, scale, alpha_gradient, beta_gradient);
}

}  // namespace espalier::retrain
#endif
