#include "pipeline/train/softmax_kernel.h"

#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "pipeline/train/softmax_kernel.cpp"
// The order matters to Highway.
// clang-format off
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace espalier::train {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using FloatVector = hn::Vec<FloatTag>;

float row_maximum(const float* row, int64_t count) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  FloatVector largest = hn::Set(d, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) largest = hn::Max(largest, hn::LoadU(d, row + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; i < count; ++i) result = row[i] > result ? row[i] : result;
  return result;
}

/// Sum of exp(row - shift), the exponentials kept in `kept` unless it is null.
double exponential_sum(const float* row, int64_t count, float shift, float* kept) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const FloatVector offset = hn::Set(d, shift);
  FloatVector sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const FloatVector e = hn::Exp(d, hn::Sub(hn::LoadU(d, row + i), offset));
    sum = hn::Add(sum, e);
    if (kept) hn::StoreU(e, d, kept + i);
  }
  double total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < count; ++i) {
    const float e = std::exp(row[i] - shift);
    total += e;
    if (kept) kept[i] = e;
  }
  return total;
}

double RowLoss(const float* logits, int64_t vocabulary, int64_t label) {
  const float shift = row_maximum(logits, vocabulary);
  const double sum = exponential_sum(logits, vocabulary, shift, nullptr);
  return std::log(sum) - (static_cast<double>(logits[label]) - static_cast<double>(shift));
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// gradient = exponentials * factor, rounded to nearest even.
void scale_to_bfloat16(const float* exponentials, int64_t count, float factor, uint16_t* gradient) {
  const FloatTag d;
  const hn::RebindToUnsigned<FloatTag> du;
  const hn::RebindToSigned<FloatTag> di;
  const hn::Rebind<uint16_t, FloatTag> dh;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const FloatVector scale = hn::Set(d, factor);
  const auto half = hn::Set(du, 0x7fffu), one = hn::Set(du, 1u);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto bits = hn::BitCast(du, hn::Mul(hn::LoadU(d, exponentials + i), scale));
    const auto odd = hn::And(hn::ShiftRight<16>(bits), one);
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(half, odd)));
    hn::StoreU(hn::DemoteTo(dh, hn::BitCast(di, rounded)), dh, gradient + i);
  }
  for (; i < count; ++i) gradient[i] = to_bfloat16(exponentials[i] * factor);
}

double RowLossAndGradient(float* logits, int64_t vocabulary, int64_t label, uint16_t* gradient) {
  const float shift = row_maximum(logits, vocabulary);
  const double at_label = static_cast<double>(logits[label]) - static_cast<double>(shift);
  const double sum = exponential_sum(logits, vocabulary, shift, logits);
  const auto factor = static_cast<float>(1.0 / sum);
  const float label_gradient = logits[label] * factor - 1.0f;
  if (gradient) {
    scale_to_bfloat16(logits, vocabulary, factor, gradient);
    gradient[label] = to_bfloat16(label_gradient);
  } else {
    for (int64_t i = 0; i < vocabulary; ++i) logits[i] *= factor;
    logits[label] = label_gradient;
  }
  return std::log(sum) - at_label;
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::train
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::train {

HWY_EXPORT(RowLoss);
HWY_EXPORT(RowLossAndGradient);

double row_loss(const float* logits, int64_t vocabulary, int64_t label) {
  return HWY_DYNAMIC_DISPATCH(RowLoss)(logits, vocabulary, label);
}

double row_loss_and_gradient(float* logits, int64_t vocabulary, int64_t label, uint16_t* gradient) {
  return HWY_DYNAMIC_DISPATCH(RowLossAndGradient)(logits, vocabulary, label, gradient);
}

}  // namespace espalier::train
#endif
