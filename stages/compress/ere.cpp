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
  const Tensor target = project(u, mask.defined() ? delta * mask : delta, v);
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

/// x / 2^exponent has its largest magnitude in [0.5, 1).
int exponent_of(double largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  return exponent;
}

void store_diagonal(EncodedMatrix& encoded, const Tensor& d) {
  encoded.exponent = exponent_of(d.abs().max().item<double>());
  encoded.diagonal =
      (d * std::ldexp(1.0, -static_cast<int>(encoded.exponent))).to(at::kHalf).contiguous();
}

/// The entries of Delta that are stored when each stands by itself; undefined: all.
Tensor stored_entries(const EncodedMatrix& encoded, const Tensor& base) {
  if (!encoded.mask_preserving) return {};
  return (base != 0).reshape({encoded.u.count, encoded.u.length});
}

/// The residual alone, before the mask.
Tensor decoded_delta(const EncodedMatrix& encoded, const Tensor& base, bool polar) {
  if (encoded.truncation_rank() == 0)
    return dequantize_rows(encoded.u, stored_entries(encoded, base)) *
           std::ldexp(1.0, static_cast<int>(encoded.exponent));
  const Tensor left = factor(encoded.u, polar), right = factor(encoded.v, polar);
  return at::mm(left * diagonal_of(encoded), right.t());
}

}  // namespace

double bytes_of_triplet(int64_t rows, int64_t columns, int64_t bits) {
  const double scales_and_diagonal = double(2 * scales_of(1, bits) + 1) * 2;
  return double(rows + columns) * double(bits) / 8 + scales_and_diagonal;
}

bool zeros_survive(const at::Tensor& base, const at::Tensor& fine_tuned) {
  const Tensor zero = base == 0;
  return zero.any().item<bool>() && !zero.logical_and(fine_tuned != 0).any().item<bool>();
}

EncodedMatrix encode_matrix(const Difference& difference, int64_t bits, bool polar,
                            EncodingErrors* errors) {
  const linalg::OneThread one_thread;
  const Tensor& delta = difference.delta;
  EncodedMatrix encoded;
  encoded.u = quantize(difference.u, bits);
  encoded.v = quantize(difference.v, bits);
  encoded.mask_preserving = difference.mask_preserving;
  const Tensor left = factor(encoded.u, polar), right = factor(encoded.v, polar);
  Tensor mask;
  if (difference.mask_preserving)
    mask = (difference.base.reshape(delta.sizes()) != 0).to(at::kDouble);
  store_diagonal(encoded, refit(left, delta, right, mask, polar));
  if (errors != nullptr) {
    const double norm = delta.norm().item<double>();
    const Tensor exact =
        at::mm(difference.u.to(at::kDouble) * difference.s, difference.v.to(at::kDouble).t());
    const Tensor best = refit(left, exact, right, mask, polar);
    const Tensor lost = exact - at::mm(left * best, right.t());
    errors->quantization = (mask.defined() ? lost * mask : lost).norm().item<double>() / norm;
    const Tensor decoded = at::mm(left * diagonal_of(encoded), right.t());
    const Tensor kept = mask.defined() ? decoded * mask : decoded;
    errors->total = (delta - kept).norm().item<double>() / norm;
  }
  return encoded;
}

EncodedMatrix encode_entries(const Difference& difference, int64_t bits, EncodingErrors* errors) {
  const linalg::OneThread one_thread;
  const Tensor& delta = difference.delta;
  EncodedMatrix encoded;
  encoded.mask_preserving = difference.mask_preserving;
  encoded.u = {delta.size(1), delta.size(0), bits, {}, {}};
  encoded.v = {0, 0, bits, at::empty({0}, at::kByte), at::empty({0}, at::kHalf)};
  encoded.diagonal = at::empty({0}, at::kHalf);
  encoded.exponent = exponent_of(at::linalg_vector_norm(delta, 2, {1}).max().item<double>());
  const Tensor kept = stored_entries(encoded, difference.base);
  encoded.entries = kept.defined() ? kept.sum().item<int64_t>() : delta.numel();
  encoded.u =
      quantize_rows(delta * std::ldexp(1.0, -static_cast<int>(encoded.exponent)), kept, bits);
  if (errors != nullptr) {
    errors->total = (delta - decoded_delta(encoded, difference.base, false)).norm().item<double>() /
                    delta.norm().item<double>();
    errors->quantization = errors->total;
  }
  return encoded;
}

at::Tensor decode_matrix(const EncodedMatrix& encoded, const at::Tensor& base, bool polar,
                         at::ScalarType dtype) {
  const linalg::OneThread one_thread;
  Tensor whole = decoded_delta(encoded, base, polar).reshape(base.sizes());
  whole.add_(base);
  if (encoded.mask_preserving) whole.masked_fill_(base == 0, 0.0);
  return whole.to(dtype).contiguous();
}

}  // namespace espalier::compress
