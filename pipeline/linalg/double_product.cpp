#include "pipeline/linalg/double_product.h"

#include <algorithm>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "pipeline/linalg/double_product.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace espalier::linalg {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::ScalableTag<double>;

// Four rows of C, two vectors wide; `packed` is B as [k][2 vectors].
void FourRows(DoubleView c, DoubleView a, const double* packed, int64_t k) {
  const Tag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const double *a0 = a.at(0, 0), *a1 = a.at(1, 0), *a2 = a.at(2, 0), *a3 = a.at(3, 0);
  double *c0 = c.at(0, 0), *c1 = c.at(1, 0), *c2 = c.at(2, 0), *c3 = c.at(3, 0);
  auto s00 = hn::LoadU(d, c0), s01 = hn::LoadU(d, c0 + lanes);
  auto s10 = hn::LoadU(d, c1), s11 = hn::LoadU(d, c1 + lanes);
  auto s20 = hn::LoadU(d, c2), s21 = hn::LoadU(d, c2 + lanes);
  auto s30 = hn::LoadU(d, c3), s31 = hn::LoadU(d, c3 + lanes);
  for (int64_t i = 0; i < k; ++i, packed += 2 * lanes) {
    const auto b0 = hn::LoadU(d, packed), b1 = hn::LoadU(d, packed + lanes);
    const auto x0 = hn::Set(d, a0[i]), x1 = hn::Set(d, a1[i]);
    const auto x2 = hn::Set(d, a2[i]), x3 = hn::Set(d, a3[i]);
    s00 = hn::NegMulAdd(x0, b0, s00), s01 = hn::NegMulAdd(x0, b1, s01);
    s10 = hn::NegMulAdd(x1, b0, s10), s11 = hn::NegMulAdd(x1, b1, s11);
    s20 = hn::NegMulAdd(x2, b0, s20), s21 = hn::NegMulAdd(x2, b1, s21);
    s30 = hn::NegMulAdd(x3, b0, s30), s31 = hn::NegMulAdd(x3, b1, s31);
  }
  hn::StoreU(s00, d, c0), hn::StoreU(s01, d, c0 + lanes);
  hn::StoreU(s10, d, c1), hn::StoreU(s11, d, c1 + lanes);
  hn::StoreU(s20, d, c2), hn::StoreU(s21, d, c2 + lanes);
  hn::StoreU(s30, d, c3), hn::StoreU(s31, d, c3 + lanes);
}

// What fills no four rows or no two vectors.
void Edge(DoubleView c, DoubleView a, const double* packed, int64_t packed_width, int64_t m,
          int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t j = 0; j < n; ++j) *c.at(i, j) -= *a.at(i, p) * packed[p * packed_width + j];
}

// A strip of columns of C, with B's strip packed so that its rows do not fall on the same cache
// sets.
void SubtractProduct(DoubleView c, DoubleView a, DoubleView b, bool b_is_transposed, int64_t m,
                     int64_t n, int64_t k, double* packed) {
  const int64_t strip = 2 * static_cast<int64_t>(hn::Lanes(Tag()));
  for (int64_t j = 0; j < n; j += strip) {
    const int64_t width = std::min(strip, n - j);
    for (int64_t p = 0; p < k; ++p)
      for (int64_t q = 0; q < width; ++q)
        packed[p * strip + q] = b_is_transposed ? *b.at(j + q, p) : *b.at(p, j + q);
    int64_t i = 0;
    if (width == strip)
      for (; i + 4 <= m; i += 4) FourRows(c.block(i, j), a.block(i, 0), packed, k);
    Edge(c.block(i, j), a.block(i, 0), packed, strip, m - i, width, k);
  }
}

int64_t StripColumns() { return 2 * static_cast<int64_t>(hn::Lanes(Tag())); }

}  // namespace HWY_NAMESPACE
}  // namespace espalier::linalg
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::linalg {
namespace {

HWY_EXPORT(SubtractProduct);
HWY_EXPORT(StripColumns);

constexpr int64_t kDepth = 256;  // of k at a time: a packed strip stays in the first cache

}  // namespace

void subtract_product(DoubleView c, DoubleView a, DoubleView b, bool b_is_transposed, int64_t m,
                      int64_t n, int64_t k) {
  std::vector<double> packed(kDepth * HWY_DYNAMIC_DISPATCH(StripColumns)());
  for (int64_t p = 0; p < k; p += kDepth) HWY_DYNAMIC_DISPATCH(SubtractProduct)
  (c, a.block(0, p), b_is_transposed ? b.block(0, p) : b.block(p, 0), b_is_transposed, m, n,
   std::min(kDepth, k - p), packed.data());
}

}  // namespace espalier::linalg
#endif  // HWY_ONCE
