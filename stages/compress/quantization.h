#pragma once
/// Singular vectors in b bits: code c in [0, 2^b) stands for (c - (2^b - 1) / 2) * step, symmetric
/// levels without a zero, so that b = 1 is the sign. One float16 step per singular vector, stored
/// times sqrt(length): a unit vector's entries are about 1/sqrt(length), which in long vectors
/// would leave float16's range. "16 bits" are float16 numbers, value * sqrt(length), without a
/// step.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace espalier::compress {

inline constexpr int64_t kHalfBits = 16;

struct QuantizedVectors {
  int64_t length = 0, count = 0;  ///< of one vector; vectors
  int64_t bits = 0;
  at::Tensor codes;   ///< uint8 [packed_bytes(length, count, bits)]
  at::Tensor scales;  ///< float16 [count]: step * sqrt(length); [0] for 16 bits
};

/// Bytes of `count` vectors of `length` codes, one bit stream.
int64_t packed_bytes(int64_t length, int64_t count, int64_t bits);
/// How many scales `count` vectors have.
int64_t scales_of(int64_t count, int64_t bits);

/// Rounds the columns of vectors [length, count] (float32 or float64) to the nearest level. The
/// step is the one of least squared error among a few starts, each improved by least squares on its
/// own codes; for b = 1 that is the closed form. Deterministic; about 30 passes over the vectors.
/// Throws NumericalError on NaN or Inf.
QuantizedVectors quantize(const at::Tensor& vectors, int64_t bits);

/// float64 [length, count].
at::Tensor dequantize(const QuantizedVectors& quantized);

/// The same for the rows of values [count, length] where only the entries of bool `kept` [count,
/// length] have a code, in the order of the rows (undefined: all entries). bits 1 to 8; codes uint8
/// [packed_bytes(kept entries, 1, bits)].
QuantizedVectors quantize_rows(const at::Tensor& values, const at::Tensor& kept, int64_t bits);

/// float64 [count, length], 0 where nothing was kept. Throws UserError when the codes are not as
/// many as `kept` says.
at::Tensor dequantize_rows(const QuantizedVectors& quantized, const at::Tensor& kept);

}  // namespace espalier::compress
