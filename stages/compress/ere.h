#pragma once
/// One matrix as a quantized low-rank residual (ERE, arXiv 2305.18425): Delta ~ U D V^T with U and
/// V in b bits and D in float16; decoding replaces U and V by the nearest matrices with orthonormal
/// columns, and D was refitted to exactly those (ours).

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "stages/compress/quantization.h"

namespace espalier::compress {

struct EncodedMatrix {
  QuantizedVectors u, v;  ///< [m, r], [n, r]
  at::Tensor diagonal;    ///< float16 [r]: D / 2^exponent
  int64_t exponent = 0;   ///< brings the largest |D| into [0.5, 1)
  /// Zeros of the base stay zero: decoded as (base + residual) * (base != 0).
  bool mask_preserving = false;
  /// Without singular vectors (v and the diagonal are empty): u holds the m rows of Delta /
  /// 2^exponent entry by entry, so many of them: those inside the mask.
  int64_t entries = 0;

  int64_t truncation_rank() const { return v.count; }
};

/// One matrix to encode: folded, float64, with its leading singular triplets u [m, r], s float64
/// [r], v [n, r], r >= 1 (undefined where nothing is truncated).
struct Difference {
  const at::Tensor& base;  ///< any shape and type
  const at::Tensor& delta;
  bool mask_preserving = false;
  at::Tensor u, s, v;
};

/// Bytes of one singular triplet in the file (to be rounded up once a matrix).
double bytes_of_triplet(int64_t rows, int64_t columns, int64_t bits);

/// True when the base has zeros and the fine-tuned tensor is zero at every one of them.
bool zeros_survive(const at::Tensor& base, const at::Tensor& fine_tuned);

/// Frobenius norms relative to ||Delta||.
struct EncodingErrors {
  double quantization = 0;  ///< ||X - U D V^T||, X = U_r S_r V_r^T, D its own refit
  double total = 0;         ///< ||Delta - decoded residual||, after the mask
};

/// Encodes Delta from its singular triplets.
///
/// D is refitted by least squares to the factors as they will be decoded: diag(U^T Delta V) when
/// they are orthonormal (`polar`) and all of the product counts; on a masked base, where entries
/// off the mask are dropped, and without the polar factor by conjugate gradients on the normal
/// equations (tried on a half-masked 1536 x 576 difference, rank 64, 4 bits: relative error 0.35
/// with D refitted to the mask, 0.66 without). About (4 + 4 * iterations) m n r FLOPs; the m x n
/// products are float64.
EncodedMatrix encode_matrix(const Difference& difference, int64_t bits, bool polar,
                            EncodingErrors* errors = nullptr);

/// Encodes every entry of Delta (inside the mask) by itself, one step a row.
EncodedMatrix encode_entries(const Difference& difference, int64_t bits,
                             EncodingErrors* errors = nullptr);

/// base + residual (masked when the matrix says so) in `dtype`, the shape of `base`. The same bits
/// wherever the same libraries run; one thread. polar_factor of both sides and one m n r product.
at::Tensor decode_matrix(const EncodedMatrix& encoded, const at::Tensor& base, bool polar,
                         at::ScalarType dtype);

}  // namespace espalier::compress
