#include "stages/compress/ere.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/one_thread.h"
#include "pipeline/linalg/svd.h"

namespace espalier::compress {
namespace {

using at::Tensor;

constexpr int kRefitSteps = 8;

Tensor factor(const QuantizedVectors& quantized, bool polar) {
  const Tensor vectors = dequantize(quantized);
  return polar ? linalg::polar_factor(vectors) : vectors;
}

Tensor diagonal_of(const EncodedMatrix& encoded) {
  return encoded.diagonal.to(at::kDouble) * std::ldexp(1.0, static_cast<int>(encoded.exponent));
}

/// diag(U^T X V).
Tensor project(const Tensor& u, const Tensor& x, const Tensor& v) {
  return (at::mm(x, v) * u).sum(0);
}

/// The d of least ||(Delta - U diag(d) V^T) * mask||; an undefined mask counts every entry.
Tensor refit(const Tensor& u, const Tensor& delta, const Tensor& v, const Tensor& mask,
             bool orthonormal) {
  const Tensor target = project(u, delta, v);
  if (orthonormal && !mask.defined()) return target;
  const auto normal_equations = [&](const Tensor& d) {
    const Tensor product = at::mm(u * d, v.t());
    return project(u, mask.defined() ? product * mask : product, v);
  };
  // Columns of zeros (nothing survived the rounding) have no say: their D stays 0.
  const Tensor scale = u.square().sum(0) * v.square().sum(0);
  Tensor d = at::where(scale > 0, target / scale, at::zeros_like(target));
  Tensor residual = target - normal_equations(d);
  Tensor direction = residual.clone();
  double square = residual.square().sum().item<double>();
  // float16 keeps 11 bits of D: a relative residual of 1e-4 is as good as none.
  const double enough = 1e-8 * target.square().sum().item<double>();
  for (int step = 0; step < kRefitSteps && square > enough; ++step) {
    const Tensor image = normal_equations(direction);
    const double curvature = (direction * image).sum().item<double>();
    if (!(curvature > 0)) break;
    d = d + (square / curvature) * direction;
    residual = residual - (square / curvature) * image;
    const double next = residual.square().sum().item<double>();
    direction = residual + (next / square) * direction;
    square = next;
  }
  return d;
}

void store_diagonal(EncodedMatrix& encoded, const Tensor& d) {
  int exponent = 0;
  std::frexp(d.abs().max().item<double>(), &exponent);
  encoded.exponent = exponent;
  encoded.diagonal = (d * std::ldexp(1.0, -exponent)).to(at::kHalf).contiguous();
}

}  // namespace

double bytes_of_triplet(int64_t rows, int64_t columns, int64_t bits) {
  constexpr double kScalesAndDiagonal = 3 * 2;
  return double(rows + columns) * double(bits) / 8 + kScalesAndDiagonal;
}

bool zeros_survive(const at::Tensor& base, const at::Tensor& fine_tuned) {
  const Tensor zero = base == 0;
  return zero.any().item<bool>() && !zero.logical_and(fine_tuned != 0).any().item<bool>();
}

EncodedMatrix encode_matrix(const at::Tensor& base, const at::Tensor& delta, const at::Tensor& u,
                            const at::Tensor& s, const at::Tensor& v, int64_t bits, bool polar,
                            bool mask_preserving, EncodingErrors* errors) {
  const linalg::OneThread one_thread;
  EncodedMatrix encoded;
  encoded.u = quantize(u, bits);
  encoded.v = quantize(v, bits);
  encoded.mask_preserving = mask_preserving;
  const Tensor left = factor(encoded.u, polar), right = factor(encoded.v, polar);
  Tensor mask;
  if (mask_preserving) mask = (base.reshape(delta.sizes()) != 0).to(at::kDouble);
  store_diagonal(encoded, refit(left, delta, right, mask, polar));
  if (errors != nullptr) {
    const double norm = delta.norm().item<double>();
    const Tensor exact = at::mm(u.to(at::kDouble) * s, v.to(at::kDouble).t());
    const Tensor best = refit(left, exact, right, {}, polar);
    errors->quantization = (exact - at::mm(left * best, right.t())).norm().item<double>() / norm;
    const Tensor decoded = at::mm(left * diagonal_of(encoded), right.t());
    const Tensor kept = mask.defined() ? decoded * mask : decoded;
    errors->total = (delta - kept).norm().item<double>() / norm;
  }
  return encoded;
}

at::Tensor decode_matrix(const EncodedMatrix& encoded, const at::Tensor& base, bool polar,
                         at::ScalarType dtype) {
  const linalg::OneThread one_thread;
  const Tensor left = factor(encoded.u, polar), right = factor(encoded.v, polar);
  Tensor whole = at::mm(left * diagonal_of(encoded), right.t()).reshape(base.sizes());
  whole.add_(base);
  if (encoded.mask_preserving) whole.masked_fill_(base == 0, 0.0);
  return whole.to(dtype).contiguous();
}

}  // namespace espalier::compress
