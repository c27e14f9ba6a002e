#pragma once
/// The elementwise passes of the layer-wise solvers (ALPS, conjugate gradients), vectorised
/// (Highway); one thread. `pruned` bytes are 1 where a weight is 0.

#include <cstdint>

namespace espalier::prune {

/// out[i,j] = values[i,j] * factor[j], rows of n.
void scale_columns(const float* values, const float* factor, int64_t rows, int64_t n, float* out);
/// values[i,j] = (values[i,j] + addend[i,j]) * factor[j], rows of n.
void add_and_scale_columns(float* values, const float* addend, const float* factor, int64_t rows,
                           int64_t n);

/// ALPS keeps D where a weight stays and the dual V where it is pruned, as each is 0 where the
/// other is not: state. out = rho D - V.
void penalty_minus_dual(const float* state, const uint8_t* pruned, float rho, int64_t count,
                        float* out);
/// state = B + V / rho, and its magnitude.
void add_dual(const float* solution, const uint8_t* pruned, float rho, int64_t count, float* state,
              float* magnitude);
/// state = pruned ? rho state : state: D and V of the new mask.
void split_by_mask(float* state, const uint8_t* pruned, float rho, int64_t count);

/// magnitude[i] = |values[i]|.
void magnitudes(const float* values, int64_t count, float* magnitude);
/// sum a_i b_i, in an order that depends on n alone.
float dot(const float* a, const float* b, int64_t n);
/// y += factor * x.
void add_scaled(float factor, const float* x, int64_t n, float* y);
/// y = x + factor * y.
void scale_and_add(float factor, const float* x, int64_t n, float* y);

}  // namespace espalier::prune
