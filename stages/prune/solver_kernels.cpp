#include "stages/prune/solver_kernels.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "stages/prune/solver_kernels.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace espalier::prune {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::ScalableTag<int32_t>;
using ByteTag = hn::Rebind<uint8_t, IntTag>;

// Where the bytes are not 0.
auto PrunedLanes(const uint8_t* pruned) {
  const IntTag d;
  const auto goes = hn::Ne(hn::PromoteTo(d, hn::LoadU(ByteTag(), pruned)), hn::Zero(d));
  return hn::MaskFromVec(hn::BitCast(FloatTag(), hn::VecFromMask(d, goes)));
}

void ScaleColumns(const float* values, const float* factor, int64_t rows, int64_t n, float* out) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < rows; ++i, values += n, out += n) {
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes)
      hn::StoreU(hn::Mul(hn::LoadU(d, values + j), hn::LoadU(d, factor + j)), d, out + j);
    for (; j < n; ++j) out[j] = values[j] * factor[j];
  }
}

void AddAndScaleColumns(float* values, const float* addend, const float* factor, int64_t rows,
                        int64_t n) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < rows; ++i, values += n, addend += n) {
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
      const auto sum = hn::Add(hn::LoadU(d, values + j), hn::LoadU(d, addend + j));
      hn::StoreU(hn::Mul(sum, hn::LoadU(d, factor + j)), d, values + j);
    }
    for (; j < n; ++j) values[j] = (values[j] + addend[j]) * factor[j];
  }
}

void PenaltyMinusDual(const float* state, const uint8_t* pruned, float rho, int64_t count,
                      float* out) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto penalty = hn::Set(d, rho);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const auto value = hn::LoadU(d, state + j);
    hn::StoreU(hn::IfThenElse(PrunedLanes(pruned + j), hn::Neg(value), hn::Mul(penalty, value)), d,
               out + j);
  }
  for (; j < count; ++j) out[j] = pruned[j] ? -state[j] : rho * state[j];
}

void AddDual(const float* solution, const uint8_t* pruned, float inverse_rho, int64_t count,
             float* state, float* magnitude) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto inverse = hn::Set(d, inverse_rho);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const auto b = hn::LoadU(d, solution + j);
    const auto dual = hn::Mul(hn::LoadU(d, state + j), inverse);
    const auto sum = hn::Add(b, hn::IfThenElseZero(PrunedLanes(pruned + j), dual));
    hn::StoreU(sum, d, state + j);
    hn::StoreU(hn::Abs(sum), d, magnitude + j);
  }
  for (; j < count; ++j) {
    const float dual = state[j] * inverse_rho;
    state[j] = solution[j] + (pruned[j] ? dual : 0);
    magnitude[j] = std::fabs(state[j]);
  }
}

void SplitByMask(float* state, const uint8_t* pruned, float rho, int64_t count) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto penalty = hn::Set(d, rho);
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const auto value = hn::LoadU(d, state + j);
    hn::StoreU(hn::IfThenElse(PrunedLanes(pruned + j), hn::Mul(penalty, value), value), d,
               state + j);
  }
  for (; j < count; ++j)
    if (pruned[j]) state[j] *= rho;
}

void Magnitudes(const float* values, int64_t count, float* magnitude) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes)
    hn::StoreU(hn::Abs(hn::LoadU(d, values + j)), d, magnitude + j);
  for (; j < count; ++j) magnitude[j] = std::fabs(values[j]);
}

float Dot(const float* a, const float* b, int64_t n) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto even = hn::Zero(d), odd = hn::Zero(d);
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    even = hn::MulAdd(hn::LoadU(d, a + j), hn::LoadU(d, b + j), even);
    odd = hn::MulAdd(hn::LoadU(d, a + j + lanes), hn::LoadU(d, b + j + lanes), odd);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd)));
  for (; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

void AddScaled(float factor, const float* x, int64_t n, float* y) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto times = hn::Set(d, factor);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes)
    hn::StoreU(hn::MulAdd(times, hn::LoadU(d, x + j), hn::LoadU(d, y + j)), d, y + j);
  for (; j < n; ++j) y[j] += factor * x[j];
}

void ScaleAndAdd(float factor, const float* x, int64_t n, float* y) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto times = hn::Set(d, factor);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes)
    hn::StoreU(hn::MulAdd(times, hn::LoadU(d, y + j), hn::LoadU(d, x + j)), d, y + j);
  for (; j < n; ++j) y[j] = x[j] + factor * y[j];
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::prune
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::prune {
namespace {

HWY_EXPORT(ScaleColumns);
HWY_EXPORT(AddAndScaleColumns);
HWY_EXPORT(PenaltyMinusDual);
HWY_EXPORT(AddDual);
HWY_EXPORT(SplitByMask);
HWY_EXPORT(Magnitudes);
HWY_EXPORT(Dot);
HWY_EXPORT(AddScaled);
HWY_EXPORT(ScaleAndAdd);

}  // namespace

void scale_columns(const float* values, const float* factor, int64_t rows, int64_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(ScaleColumns)(values, factor, rows, n, out);
}
void add_and_scale_columns(float* values, const float* addend, const float* factor, int64_t rows,
                           int64_t n) {
  HWY_DYNAMIC_DISPATCH(AddAndScaleColumns)(values, addend, factor, rows, n);
}
void penalty_minus_dual(const float* state, const uint8_t* pruned, float rho, int64_t count,
                        float* out) {
  HWY_DYNAMIC_DISPATCH(PenaltyMinusDual)(state, pruned, rho, count, out);
}
void add_dual(const float* solution, const uint8_t* pruned, float rho, int64_t count, float* state,
              float* magnitude) {
  HWY_DYNAMIC_DISPATCH(AddDual)(solution, pruned, 1 / rho, count, state, magnitude);
}
void split_by_mask(float* state, const uint8_t* pruned, float rho, int64_t count) {
  HWY_DYNAMIC_DISPATCH(SplitByMask)(state, pruned, rho, count);
}
void magnitudes(const float* values, int64_t count, float* magnitude) {
  HWY_DYNAMIC_DISPATCH(Magnitudes)(values, count, magnitude);
}
float dot(const float* a, const float* b, int64_t n) { return HWY_DYNAMIC_DISPATCH(Dot)(a, b, n); }
void add_scaled(float factor, const float* x, int64_t n, float* y) {
  HWY_DYNAMIC_DISPATCH(AddScaled)(factor, x, n, y);
}
void scale_and_add(float factor, const float* x, int64_t n, float* y) {
  HWY_DYNAMIC_DISPATCH(ScaleAndAdd)(factor, x, n, y);
}

}  // namespace espalier::prune
#endif  // HWY_ONCE
