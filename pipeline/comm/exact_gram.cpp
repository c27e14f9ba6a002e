#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "pipeline/comm/exact_kernel.h"
#include "pipeline/comm/exact_rounding.h"
#include "pipeline/comm/exact_sum.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

/// A feature's exponent is never further than this below the largest.
constexpr int kLargestGap = 12;

}  // namespace

ExactGram::ExactGram(int64_t n, int64_t units) : n_(n), units_(units) {
  if (n < 1 || units < 1)
    throw DefectError(
        fmt::format("ExactGram: {} features and {} units, expected at least 1", n, units));
  sums_.assign(n * (n + 1) / 2, 0);
  exponents_.assign(n, 0);
  scales_.assign(n, 1.0);
}

void ExactGram::set_grid(std::span<const float> diagonal_of_unit_0, int headroom) {
  if (static_cast<int64_t>(diagonal_of_unit_0.size()) != n_)
    throw DefectError(
        fmt::format("ExactGram: a diagonal of {} for {} features", diagonal_of_unit_0.size(), n_));
  const int units_bits = std::bit_width(static_cast<uint64_t>(units_ - 1));
  const int bits = 62 - headroom - units_bits;
  // G_ii lies on the grid 2^(2 e_i): half of the exponent that brings it to 2^bits, rounded up.
  const auto half_exponent = [&](double entry) { return (grid_exponent(entry, bits) + 1) >> 1; };
  double largest = 0;
  for (int64_t i = 0; i < n_; ++i) {
    const double entry = diagonal_of_unit_0[i];
    if (!std::isfinite(entry))
      throw NumericalError(fmt::format("the Gram of unit 0 holds {} for feature {}", entry, i));
    largest = std::max(largest, entry);
  }
  const int lowest = half_exponent(largest) - kLargestGap;
  std::vector<int> exponents(n_);
  for (int64_t i = 0; i < n_; ++i)
    exponents[i] = std::max(lowest, half_exponent(diagonal_of_unit_0[i]));
  set_exponents(exponents);
}

void ExactGram::set_exponents(std::span<const int> exponents) {
  if (static_cast<int64_t>(exponents.size()) != n_)
    throw DefectError(fmt::format("ExactGram: {} exponents for {} features", exponents.size(), n_));
  exponents_.assign(exponents.begin(), exponents.end());
  for (int64_t i = 0; i < n_; ++i) scales_[i] = std::ldexp(1.0, -exponents_[i]);
  std::fill(sums_.begin(), sums_.end(), 0);
  overflowed_ = false;
}

void ExactGram::add(const float* gram, int64_t stride) {
  const double limit = unit_limit(units_);
  int64_t* sums = sums_.data();
  for (int64_t i = 0; i < n_; ++i) {
    const float* row = gram + i * stride;
    const uint64_t bits = add_on_grid(row + i, scales_.data() + i, scales_[i], sums, n_ - i);
    if (bits >= kInfinityBits) {
      const float* bad = std::find_if(row + i, row + n_, [](float v) { return !std::isfinite(v); });
      throw NumericalError(fmt::format("a unit's Gram holds {} at features {} and {}",
                                       bad == row + n_ ? INFINITY : *bad, i, bad - row));
    }
    overflowed_ |= std::bit_cast<double>(bits) > limit;
    sums += n_ - i;
  }
}

void ExactGram::merge(const ExactGram& other) {
  if (other.n_ != n_ || other.exponents_ != exponents_)
    throw DefectError("ExactGram: merge of Grams with different sizes or grids");
  add_wrapping(sums_, other.sums_);
  overflowed_ |= other.overflowed_;
}

void ExactGram::reduce(const Communicator& group) {
  if (group.size() == 1) return;
  group.all_reduce_sum(sums_);
  int64_t flag = overflowed_ ? 1 : 0;
  group.all_reduce_max(std::span<int64_t>(&flag, 1));
  overflowed_ = flag != 0;
}

void ExactGram::result(double* out, double factor) const {
  // Tiles, so that the mirrored writes stay in the cache.
  constexpr int64_t tile = 32;
  const auto packed = [&](int64_t i) { return i * n_ - i * (i - 1) / 2 - i; };  // + j
  std::vector<double> units(n_);
  for (int64_t i = 0; i < n_; ++i) units[i] = std::ldexp(1.0, exponents_[i]);
  for (int64_t top = 0; top < n_; top += tile)
    for (int64_t left = top; left < n_; left += tile)
      for (int64_t i = top; i < std::min(top + tile, n_); ++i) {
        const int64_t* sums = sums_.data() + packed(i);
        for (int64_t j = std::max(i, left); j < std::min(left + tile, n_); ++j) {
          const double entry = static_cast<double>(sums[j]) * units[i] * units[j] * factor;
          out[i * n_ + j] = entry;
          out[j * n_ + i] = entry;
        }
      }
}

}  // namespace espalier::comm
