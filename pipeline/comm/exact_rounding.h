#pragma once
/// Grids and roundings that ExactSum and ExactGram share.

#include <bit>
#include <cmath>
#include <cstdint>
#include <span>

namespace espalier::comm {

/// The largest scaled magnitude of one unit: `units` of them stay below 2^62.
inline double unit_limit(int64_t units) { return 0x1p62 / static_cast<double>(units); }

/// e such that largest * 2^-e lies in [2^(bits-1), 2^bits); anything below 2^-100 counts as 2^-100.
inline int grid_exponent(double largest, int bits) {
  int exponent = 0;
  std::frexp(std::fmax(largest, 0x1p-100), &exponent);
  return exponent - bits;
}

/// The sums of a run that overflowed are thrown away, but their wrapping must be defined.
inline void add_wrapping(std::span<int64_t> sums, std::span<const int64_t> addends) {
  for (size_t i = 0; i < sums.size(); ++i)
    sums[i] =
        static_cast<int64_t>(static_cast<uint64_t>(sums[i]) + static_cast<uint64_t>(addends[i]));
}

/// An integer as a double rounded to odd where 53 bits do not hold it (with at least 43 kept), so
/// that a second rounding to float gives what one rounding of the integer would.
inline double to_odd_double(int64_t value) {
  const uint64_t magnitude =
      value < 0 ? -static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  if (magnitude >> 53 == 0) return static_cast<double>(value);
  constexpr uint64_t low = (uint64_t{1} << 11) - 1;
  const uint64_t odd = (magnitude & ~low) | ((magnitude & low) ? low + 1 : 0);
  return value < 0 ? -static_cast<double>(odd) : static_cast<double>(odd);
}

}  // namespace espalier::comm
