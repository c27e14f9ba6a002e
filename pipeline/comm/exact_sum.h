#pragma once
/// Exact, order-free sums over units: every addend is scaled by a power of two, rounded to int64
/// and added, so that any order, any grouping into ranks and threads, and any all-reduce give the
/// same bits (design.md, section 4).
///
/// The rounding error of one addend is at most 2^(exponent-1). Overflow is guarded by the maximum
/// over *units* (never over partial sums, which depend on the number of ranks): a unit whose
/// largest scaled magnitude exceeds 2^62 / units sets overflowed(); the caller repeats with a
/// coarser grid and says so.

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"

namespace espalier::comm {

/// Sum over units of a flat vector made of segments (tensors); one exponent a segment.
class ExactSum {
 public:
  /// segment_sizes: elements of each segment; units: how many addends at most over all ranks.
  ExactSum(std::vector<int64_t> segment_sizes, int64_t units);

  int64_t size() const { return static_cast<int64_t>(sums_.size()); }
  /// exponent[s] such that `largest[s]` becomes about 2^bits (a zero or tiny largest gets the
  /// exponent of 2^-100). Clears the sums.
  void set_grid(std::span<const double> largest, int bits = 40);
  /// The exponents, for the step checkpoint; set_exponents clears the sums.
  std::span<const int> exponents() const { return exponents_; }
  void set_exponents(std::span<const int> exponents);

  /// Adds one unit's values [size()]. Not thread-safe: one ExactSum a worker, then merge.
  /// One fused vectorised pass. Throws NumericalError naming the segment on NaN or Inf.
  void add(std::span<const float> values);
  /// The same for one segment only.
  void add(int64_t segment, std::span<const float> values);
  void merge(const ExactSum& other);
  /// Sum over all ranks, the overflow flag and unit_largest() included.
  void reduce(const Communicator& group);
  bool overflowed() const { return overflowed_; }
  /// Per segment the largest |value| of any unit added (all ranks' after reduce): the next grid.
  std::span<const double> unit_largest() const { return largest_; }

  /// The sums as floating point: integer * 2^exponent, rounded once.
  void result(std::span<float> out) const;
  void result(std::span<double> out) const;

 private:
  std::vector<int64_t> offsets_;
  std::vector<int64_t> sums_;
  std::vector<int> exponents_;
  std::vector<double> largest_;
  int64_t units_;
  bool overflowed_ = false;
};

/// Sum over units of symmetric n x n Grams; one exponent a feature, G_ij on the grid
/// 2^(e_i + e_j). Upper triangle only, packed by rows: n(n+1)/2 int64.
class ExactGram {
 public:
  ExactGram(int64_t n, int64_t units);
  int64_t n() const { return n_; }

  /// e_i from unit 0's diagonal: a unit's scaled diagonal may reach 2^62 / units, with `headroom`
  /// bits left for units larger than unit 0; e_i never lower than the largest e minus 12 (a feature
  /// silent in unit 0 still has a scale). Clears the sums.
  void set_grid(std::span<const float> diagonal_of_unit_0, int headroom = 8);
  std::span<const int> exponents() const { return exponents_; }
  void set_exponents(std::span<const int> exponents);

  /// Adds one unit's Gram: float32 [n, n] row-major, leading dimension `stride`; only j >= i is
  /// read. One fused vectorised pass of 20 bytes an entry. Throws NumericalError naming the
  /// features on NaN or Inf.
  void add(const float* gram, int64_t stride);
  void merge(const ExactGram& other);
  void reduce(const Communicator& group);
  bool overflowed() const { return overflowed_; }

  /// out float64 [n, n] row-major, both triangles: integer * 2^(e_i+e_j) rounded once, times
  /// `factor`.
  void result(double* out, double factor = 1.0) const;

 private:
  int64_t n_, units_;
  std::vector<int64_t> sums_;
  std::vector<int> exponents_;
  std::vector<double> scales_;  // 2^-e_i
  bool overflowed_ = false;
};

}  // namespace espalier::comm
