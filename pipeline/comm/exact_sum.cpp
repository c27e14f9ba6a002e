#include "pipeline/comm/exact_sum.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "pipeline/comm/exact_kernel.h"
#include "pipeline/comm/exact_rounding.h"
#include "pipeline/errors.h"

namespace espalier::comm {

ExactSum::ExactSum(std::vector<int64_t> segment_sizes, int64_t units) : units_(units) {
  if (units < 1)
    throw DefectError(fmt::format("ExactSum: units is {}, expected at least 1", units));
  offsets_.push_back(0);
  for (const int64_t size : segment_sizes) {
    if (size < 0) throw DefectError(fmt::format("ExactSum: a segment has {} elements", size));
    offsets_.push_back(offsets_.back() + size);
  }
  sums_.assign(offsets_.back(), 0);
  largest_.assign(segment_sizes.size(), 0.0);
  exponents_.assign(segment_sizes.size(), grid_exponent(0.0, 40));
}

void ExactSum::set_grid(std::span<const double> largest, int bits) {
  if (largest.size() != exponents_.size())
    throw DefectError(
        fmt::format("ExactSum: {} maxima for {} segments", largest.size(), exponents_.size()));
  std::vector<int> exponents(exponents_.size());
  for (size_t s = 0; s < exponents.size(); ++s) {
    if (!std::isfinite(largest[s]))
      throw NumericalError(fmt::format(
          "the largest magnitude of segment {} is {}, so no grid can hold its sum", s, largest[s]));
    exponents[s] = grid_exponent(std::fabs(largest[s]), bits);
  }
  set_exponents(exponents);
}

void ExactSum::set_exponents(std::span<const int> exponents) {
  if (exponents.size() != exponents_.size())
    throw DefectError(
        fmt::format("ExactSum: {} exponents for {} segments", exponents.size(), exponents_.size()));
  exponents_.assign(exponents.begin(), exponents.end());
  std::fill(sums_.begin(), sums_.end(), 0);
  std::fill(largest_.begin(), largest_.end(), 0.0);
  overflowed_ = false;
}

void ExactSum::add(std::span<const float> values) {
  if (static_cast<int64_t>(values.size()) != size())
    throw DefectError(fmt::format("ExactSum: {} values for {} sums", values.size(), size()));
  for (int64_t s = 0; s + 1 < static_cast<int64_t>(offsets_.size()); ++s)
    add(s, values.subspan(offsets_[s], offsets_[s + 1] - offsets_[s]));
}

void ExactSum::add(int64_t segment, std::span<const float> values) {
  const int64_t expected = offsets_.at(segment + 1) - offsets_.at(segment);
  if (static_cast<int64_t>(values.size()) != expected)
    throw DefectError(fmt::format("ExactSum: {} values for segment {} of {} elements",
                                  values.size(), segment, expected));
  const double scale = std::ldexp(1.0, -exponents_[segment]);
  const uint64_t bits =
      add_on_grid(values.data(), nullptr, scale, sums_.data() + offsets_[segment], expected);
  if (bits >= kInfinityBits) {
    const auto bad = std::find_if(values.begin(), values.end(),
                                  [](float value) { return !std::isfinite(value); });
    throw NumericalError(
        fmt::format("a sum over units met {} at element {} of segment {}",
                    bad == values.end() ? std::numeric_limits<float>::infinity() : *bad,
                    bad - values.begin(), segment));
  }
  const double scaled = std::bit_cast<double>(bits);
  overflowed_ |= scaled > unit_limit(units_);
  largest_[segment] = std::max(largest_[segment], std::ldexp(scaled, exponents_[segment]));
}

void ExactSum::merge(const ExactSum& other) {
  if (other.offsets_ != offsets_ || other.exponents_ != exponents_)
    throw DefectError("ExactSum: merge of sums with different segments or grids");
  add_wrapping(sums_, other.sums_);
  for (size_t s = 0; s < largest_.size(); ++s)
    largest_[s] = std::max(largest_[s], other.largest_[s]);
  overflowed_ |= other.overflowed_;
}

void ExactSum::reduce(const Communicator& group) {
  if (group.size() == 1) return;
  group.all_reduce_sum(sums_);
  std::vector<double> guards(largest_);
  guards.push_back(overflowed_ ? 1.0 : 0.0);
  group.all_reduce_max(std::span<double>(guards));
  overflowed_ = guards.back() > 0;
  std::copy_n(guards.begin(), largest_.size(), largest_.begin());
}

void ExactSum::result(std::span<float> out) const {
  if (static_cast<int64_t>(out.size()) != size())
    throw DefectError(fmt::format("ExactSum: room for {} of {} sums", out.size(), size()));
  for (size_t s = 0; s < exponents_.size(); ++s) {
    const double unit = std::ldexp(1.0, exponents_[s]);
    for (int64_t i = offsets_[s]; i < offsets_[s + 1]; ++i)
      out[i] = static_cast<float>(to_odd_double(sums_[i]) * unit);
  }
}

void ExactSum::result(std::span<double> out) const {
  if (static_cast<int64_t>(out.size()) != size())
    throw DefectError(fmt::format("ExactSum: room for {} of {} sums", out.size(), size()));
  for (size_t s = 0; s < exponents_.size(); ++s) {
    const double unit = std::ldexp(1.0, exponents_[s]);
    for (int64_t i = offsets_[s]; i < offsets_[s + 1]; ++i)
      out[i] = static_cast<double>(sums_[i]) * unit;
  }
}

}  // namespace espalier::comm
