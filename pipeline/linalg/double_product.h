#pragma once
/// The float64 product of triangular factorizations: MKL reaches 26 GFLOP/s on their narrow panels.

#include <cstdint>

namespace espalier::linalg {

/// A matrix in row-major order inside a larger one.
struct DoubleView {
  double* data;
  int64_t stride;
  double* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  DoubleView block(int64_t row, int64_t column) const { return {at(row, column), stride}; }
};

/// C[m,n] -= A[m,k] op(B), op(B) = B[k,n] or the transpose of B[n,k]. C overlaps neither. One
/// thread; the same bits whatever else runs. 2 m n k FLOPs.
void subtract_product(DoubleView c, DoubleView a, DoubleView b, bool b_is_transposed, int64_t m,
                      int64_t n, int64_t k);

}  // namespace espalier::linalg
