#include "pipeline/train/adamw_kernel.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "pipeline/train/adamw_kernel.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace espalier::train {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void step_lanes(const AdamwScalars& s, float* w, const float* g, float* m, float* v) {
  const hn::ScalableTag<float> d;
  const auto gradient = hn::LoadU(d, g);
  const auto before = hn::LoadU(d, m);
  const auto first = hn::Add(before, hn::Mul(hn::Set(d, s.lerp1), hn::Sub(gradient, before)));
  const auto second = hn::Add(hn::Mul(hn::LoadU(d, v), hn::Set(d, s.beta2)),
                              hn::Mul(hn::Mul(hn::Set(d, s.rest2), gradient), gradient));
  const auto denominator =
      hn::Add(hn::Div(hn::Sqrt(second), hn::Set(d, s.root2)), hn::Set(d, s.eps));
  const auto decayed = hn::Mul(hn::LoadU(d, w), hn::Set(d, s.keep));
  const auto move = hn::Div(hn::Mul(hn::Set(d, s.negative_step), first), denominator);
  hn::StoreU(first, d, m);
  hn::StoreU(second, d, v);
  hn::StoreU(hn::Add(decayed, move), d, w);
}

void step_all(const AdamwScalars& s, float* w, const float* g, float* m, float* v, size_t count) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) step_lanes(s, w + i, g + i, m + i, v + i);
  if (i == count) return;
  // The tail takes the same instructions on a padded copy.
  float padded[4][hn::MaxLanes(d)] = {};
  const size_t rest = count - i;
  std::copy_n(w + i, rest, padded[0]);
  std::copy_n(g + i, rest, padded[1]);
  std::copy_n(m + i, rest, padded[2]);
  std::copy_n(v + i, rest, padded[3]);
  step_lanes(s, padded[0], padded[1], padded[2], padded[3]);
  std::copy_n(padded[0], rest, w + i);
  std::copy_n(padded[2], rest, m + i);
  std::copy_n(padded[3], rest, v + i);
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::train
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::train {

HWY_EXPORT(step_all);

void adamw_step(const AdamwScalars& scalars, float* values, const float* gradient,
                float* first_moment, float* second_moment, int64_t count) {
  HWY_DYNAMIC_DISPATCH(step_all)
  (scalars, values, gradient, first_moment, second_moment, static_cast<size_t>(count));
}

}  // namespace espalier::train
#endif
