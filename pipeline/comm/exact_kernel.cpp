#include "pipeline/comm/exact_kernel.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "pipeline/comm/exact_kernel.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace espalier::comm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kChunk = 64;

/// Of kChunk values, zeros of either sign. Looking costs a twentieth of adding.
bool all_zero(const float* HWY_RESTRICT values) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> u;
  auto bits = hn::Zero(u);
  for (size_t i = 0; i < kChunk; i += hn::Lanes(d))
    bits = hn::Or(bits, hn::BitCast(u, hn::LoadU(d, values + i)));
  return hn::AllTrue(u, hn::Eq(hn::ShiftLeft<1>(bits), hn::Zero(u)));
}

template <bool kColumns>
uint64_t add_rows(const float* HWY_RESTRICT values, const double* HWY_RESTRICT column_scales,
                  double scale, int64_t* HWY_RESTRICT sums, size_t count) {
  const hn::ScalableTag<double> f64;
  const hn::RebindToSigned<decltype(f64)> i64;
  const hn::Rebind<float, decltype(f64)> f32;
  const size_t lanes = hn::Lanes(f64);
  const auto scales = hn::Set(f64, scale);

  const auto step = [&](const float* v, [[maybe_unused]] const double* c, int64_t* s, auto largest)
                        HWY_ATTR {
                          auto scaled = hn::Mul(hn::PromoteTo(f64, hn::LoadU(f32, v)), scales);
                          if constexpr (kColumns) scaled = hn::Mul(scaled, hn::LoadU(f64, c));
                          const auto rounded = hn::ConvertTo(i64, hn::Round(scaled));
                          hn::StoreU(hn::Add(hn::LoadU(i64, s), rounded), i64, s);
                          return hn::Max(largest, hn::BitCast(i64, hn::Abs(scaled)));
                        };

  const auto columns = [&](size_t i) { return kColumns ? column_scales + i : nullptr; };
  auto even = hn::Zero(i64), odd = hn::Zero(i64);
  size_t i = 0;
  const auto add_to = [&](size_t end) HWY_ATTR {
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      even = step(values + i, columns(i), sums + i, even);
      odd = step(values + i + lanes, columns(i + lanes), sums + i + lanes, odd);
    }
  };
  // The gradient of an embedding is zero but for the rows of a few tokens.
  while (i + kChunk <= count) {
    if (all_zero(values + i))
      i += kChunk;
    else
      add_to(i + kChunk);
  }
  add_to(count);
  for (; i < count; i += lanes) {
    // The tail takes the same instructions on a padded copy.
    HWY_ALIGN float v[hn::MaxLanes(f64)] = {};
    HWY_ALIGN double c[hn::MaxLanes(f64)] = {};
    HWY_ALIGN int64_t s[hn::MaxLanes(f64)] = {};
    const size_t rest = std::min(lanes, count - i);
    std::copy_n(values + i, rest, v);
    if constexpr (kColumns) std::copy_n(column_scales + i, rest, c);
    std::copy_n(sums + i, rest, s);
    even = step(v, c, s, even);
    std::copy_n(s, rest, sums + i);
  }
  return static_cast<uint64_t>(hn::GetLane(hn::MaxOfLanes(i64, hn::Max(even, odd))));
}

uint64_t add_plain(const float* values, double scale, int64_t* sums, size_t count) {
  return add_rows<false>(values, nullptr, scale, sums, count);
}

uint64_t add_columns(const float* values, const double* column_scales, double scale, int64_t* sums,
                     size_t count) {
  return add_rows<true>(values, column_scales, scale, sums, count);
}

}  // namespace espalier::comm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::comm {

HWY_EXPORT(add_plain);
HWY_EXPORT(add_columns);

uint64_t add_on_grid(const float* values, const double* column_scales, double scale, int64_t* sums,
                     int64_t count) {
  if (!column_scales)
    return HWY_DYNAMIC_DISPATCH(add_plain)(values, scale, sums, static_cast<size_t>(count));
  return HWY_DYNAMIC_DISPATCH(add_columns)(values, column_scales, scale, sums,
                                           static_cast<size_t>(count));
}

}  // namespace espalier::comm
#endif  // HWY_ONCE
