#pragma once
/// The leading part of the singular value decomposition of Delta = fine-tuned - base: as much as
/// the allocation asks for. ||Delta||^2 is cheap and exact, so f(r) = ||Delta||^2 - sum of sigma^2
/// needs no more.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "stages/compress/allocation.h"

namespace espalier::compress {

/// out x rest of a tensor of two or more dimensions.
struct Folded {
  int64_t rows = 0, columns = 0;
};
Folded folded(at::IntArrayRef shape);

/// fine_tuned - base as float64 [rows, columns]. Throws NumericalError naming `name` on NaN or Inf.
at::Tensor difference(const at::Tensor& base, const at::Tensor& fine_tuned,
                      const std::string& name);

struct Decomposition {
  double energy = 0;         ///< ||Delta||_F^2
  at::Tensor values;         ///< float64 [computed], sigma descending
  int64_t largest_rank = 0;  ///< min(m, n), or the numerical rank where the values show it
  at::Tensor u, v;           ///< float32 [m, kept], [n, kept]: kept <= computed leading vectors
};

/// `count` values (capped at min(m, n)) and `kept` of their vectors. Values below 1e-7 of the
/// largest are rounding of the subtraction: they end the spectrum. A zero matrix has no values. One
/// truncated SVD on one thread, keyed by `seed`.
Decomposition decompose(const at::Tensor& delta, int64_t count, int64_t kept, uint64_t seed);

/// What the allocation reads.
Spectrum spectrum_of(const Decomposition& decomposition, int64_t cost);

}  // namespace espalier::compress
