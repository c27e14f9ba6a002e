#pragma once
/// The inner loop of exact sums, compiled for every vector instruction set and chosen at run time.
/// Every set gives the same bits: products with powers of two are exact in double precision and the
/// rounding to the grid is to nearest, ties to even.

#include <cstdint>

namespace espalier::comm {

/// sums[i] += round(values[i] * scale * column_scales[i]) for i in [0, count); column_scales may be
/// null (all 1). scale and column_scales are powers of two.
///
/// Returns the bits of the largest |scaled value| as a double: bits of doubles without sign order
/// as the doubles do, and Inf and NaN come out above every finite one, so that one maximum finds
/// both. Scaled values beyond int64 leave meaningless sums; the caller sees them in the maximum.
uint64_t add_on_grid(const float* values, const double* column_scales, double scale, int64_t* sums,
                     int64_t count);

/// The bits of double infinity: results of add_on_grid from here on mean NaN or Inf.
inline constexpr uint64_t kInfinityBits = 0x7ff0000000000000u;

}  // namespace espalier::comm
