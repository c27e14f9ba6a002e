#pragma once
/// The elementwise and row kernels of a transformer block on the CPU, vectorised with Highway.
///
/// Arithmetic is float32 whatever the storage; `Storage` says how activations lie in memory. One
/// thread; same shapes give the same bits.

#include <cstdint>

namespace espalier::model::kernels {

enum class Storage { float32, bfloat16 };

/// y[i] = x[i] / sqrt(mean(x[i]^2) + eps) * weight, rows of n. inverse_rms [rows] float32 when not
/// null. `from_one`: times 1 + weight, added in float32.
void rms_norm(Storage storage, const void* x, const void* weight, bool from_one, int64_t rows,
              int64_t n, float eps, void* y, float* inverse_rms);
/// dx of the above.
void rms_norm_backward(Storage storage, const void* x, const void* weight, bool from_one,
                       const void* dy, const float* inverse_rms, int64_t rows, int64_t n, void* dx);

/// y = silu(gate) * up, n elements.
void silu_times(Storage storage, const void* gate, const void* up, int64_t n, void* y);
void silu_times_backward(Storage storage, const void* gate, const void* up, const void* dy,
                         int64_t n, void* dgate, void* dup);

/// Rotates the first `rotated` of `size` features of every head and gathers heads:
/// x [tokens, heads, size] with `stride` elements a token -> y [heads, tokens, size], times
/// `scale`. cosine, sine float32 [tokens, rotated / 2]: feature i turns with feature i + rotated
/// / 2. Null: no rotation.
void rotate_heads(Storage storage, const void* x, int64_t stride, int64_t tokens, int64_t heads,
                  int64_t size, int64_t rotated, const float* cosine, const float* sine,
                  float scale, void* y);
/// The transpose of the above: y [heads, tokens, size] float32 or Storage -> x [tokens, heads,
/// size].
void unrotate_heads(Storage storage, const float* y, int64_t tokens, int64_t heads, int64_t size,
                    int64_t rotated, const float* cosine, const float* sine, float scale, void* x,
                    int64_t stride);

/// Softmax over the visible part of each row: row i of `scores` [rows, columns] float32 sees
/// columns [first[i], last[i]); the rest becomes 0. Writes probabilities in Storage [rows, columns]
/// and log-sum-exp [rows] when not null. `scores` is overwritten.
void softmax_rows(Storage storage, float* scores, int64_t rows, int64_t columns,
                  const int64_t* first, const int64_t* last, void* probabilities,
                  float* log_sum_exp);
/// Probabilities again from scores and log-sum-exp, and d(scores) = P * (dP - row_dot), Storage
/// both.
void softmax_backward_rows(Storage storage, const float* scores, const float* d_probabilities,
                           int64_t rows, int64_t columns, const int64_t* first, const int64_t* last,
                           const float* log_sum_exp, const float* row_dot, void* probabilities,
                           void* d_scores, int64_t stride);
/// dot[i] = sum_j a[i,j] b[i,j], rows of n with `stride`.
void row_dots(Storage storage, const void* a, const void* b, int64_t rows, int64_t n,
              int64_t stride, float* dot);
/// sums[j] = sum_i x[i,j]^2 over rows, float32, in the order of the rows.
void column_square_sums(Storage storage, const void* x, int64_t rows, int64_t n, float* sums);
/// total += addend, float32.
void add_to(float* total, const float* addend, int64_t n);

}  // namespace espalier::model::kernels
