#pragma once
/// Matrix products of one unit on one thread.
///
/// CPU tensors go to oneDNN, which uses this processor's bfloat16 and AVX-512 instructions (MKL, as
/// ATen calls it, does not: 110 against 250 GFLOP/s in float32 and 480 in bfloat16 on one Zen 5
/// core). A processor below AVX-512 has no products of bfloat16 there: its operands are converted
/// and multiplied in float32, and the result is rounded once. Other devices go to ATen. The choice
/// depends on type, device and processor alone, never on a timing. Same shapes and types give the
/// same bits on every worker of every rank.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace espalier::linalg {

/// C[m,n] = op(A) op(B), into `out` when given (any of float32, bfloat16 whatever the inputs'
/// type), otherwise into a new tensor of `out_type`. A and B: both float32 or both bfloat16,
/// 2-dimensional, unit stride in one of their dimensions (a transposed view is a transposed
/// operand, no copy). 2 m n k FLOPs.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType out_type);
void product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
/// out[i] = a[i] b[i] of tensors [batch, rows, columns], contiguous or with the last two swapped.
void batched_product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

/// y[tokens, out] = x[tokens, in] weight[out, in]^T + bias[out]; in x's type. Differentiable in x,
/// weight and bias.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias = {});

/// X^T X of x [tokens, n] (float32 or bfloat16) as float32 [n, n]; only blocks on and above the
/// diagonal are computed: j >= i is valid, the rest is not. About tokens n^2 FLOPs.
void gram_into(at::Tensor& out, const at::Tensor& x);

/// "oneDNN 2.6.0 avx512_core_bf16": what products use here, for the manifest.
std::string product_description();

/// Sets every library to one thread on the calling thread; each worker calls it once.
void one_library_thread();

}  // namespace espalier::linalg
