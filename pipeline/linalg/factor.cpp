#include "pipeline/linalg/factor.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/double_product.h"

namespace espalier::linalg {
namespace {

constexpr int64_t kBlock = 128;
constexpr int kMostRaises = 4;

double* data_of(at::Tensor& t) { return t.data_ptr<double>(); }

// Checks the Gram, gives dead inputs a diagonal of 1, and returns the mean of the diagonal.
double prepare(at::Tensor& gram, const std::string& what, FactorReport& report) {
  const int64_t n = gram.size(0);
  double* h = data_of(gram);
  for (int64_t i = 0; i < n * n; ++i)
    if (!std::isfinite(h[i]))
      throw NumericalError(fmt::format(
          "{}: the Gram of its input holds {} at ({}, {}) of {} x {}; the model's hidden states "
          "overflow there: check the checkpoint, or use model.dtype=float32",
          what, h[i], i / n, i % n, n, n));
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    double& diagonal = h[j * n + j];
    if (diagonal == 0) {
      diagonal = 1;
      report.dead_inputs.push_back(j);
    }
    sum += diagonal;
  }
  return sum / static_cast<double>(n);
}

// H + shift I with rows and columns in reverse order.
at::Tensor reversed_and_damped(at::Tensor& gram, double shift) {
  const int64_t n = gram.size(0);
  at::Tensor reversed = at::empty({n, n}, gram.options());
  const double* h = data_of(gram);
  double* out = data_of(reversed);
  std::reverse_copy(h, h + n * n, out);
  for (int64_t j = 0; j < n; ++j) out[j * n + j] += shift;
  return reversed;
}

// A lower triangular L with H = L L^T beside the inverses of its diagonal blocks. The
// products are our own: LAPACK's factor and triangular inverse take twice and three times as long.
struct LowerFactor {
  at::Tensor lower;
  std::vector<at::Tensor> diagonal_inverses;
};

DoubleView view_of(at::Tensor& t) { return {t.data_ptr<double>(), t.stride(0)}; }

// Right-looking: the diagonal block by LAPACK, the panel below it times that block's inverse, then
// the lower part of what follows. Changes h (its upper part is left as it is); false when h is not
// positive definite.
bool factorize(at::Tensor& h, LowerFactor& result) {
  const int64_t n = h.size(0);
  result = {h, {}};
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t width = std::min(kBlock, n - first), next = first + width;
    at::Tensor diagonal = h.slice(0, first, next).slice(1, first, next);
    const auto [block, info] = at::linalg_cholesky_ex(diagonal.contiguous(), false, false);
    // A not quite indefinite block may still end with a factor that is not finite.
    if (info.item<int>() != 0 || !at::isfinite(block).all().item<bool>()) return false;
    diagonal.copy_(block);
    at::Tensor inverse =
        at::linalg_solve_triangular(block, at::eye(width, h.options()), false).contiguous();
    result.diagonal_inverses.push_back(inverse);
    if (next == n) break;
    at::Tensor panel = h.slice(0, next, n).slice(1, first, next);
    at::Tensor negative = at::zeros({n - next, width}, h.options());
    subtract_product(view_of(negative), view_of(panel), view_of(inverse), true, n - next, width,
                     width);
    panel.copy_(negative.neg_());
    for (int64_t row = next; row < n; row += kBlock) {
      const int64_t end = std::min(n, row + kBlock);
      const DoubleView whole = view_of(h);
      subtract_product(whole.block(row, next), whole.block(row, first), whole.block(next, first),
                       true, end - row, end - next, width);
    }
  }
  return true;
}

LowerFactor cholesky(at::Tensor& gram, double mean, double damping, const std::string& what,
                     FactorReport& report) {
  report.damping = damping;
  for (report.times_raised = 0;; ++report.times_raised, report.damping *= 10) {
    at::Tensor damped = reversed_and_damped(gram, report.damping * mean);
    LowerFactor factor;
    if (factorize(damped, factor)) return factor;
    if (report.times_raised == kMostRaises)
      throw NumericalError(fmt::format(
          "{}: the Gram of its input is not positive definite even with damping {} (raised from {} "
          "tenfold {} times); give more calibration samples or a larger prune.damping",
          what, report.damping, damping, kMostRaises));
  }
}

// L^-1, from the last block column to the first: X_ij = -(sum over j < k <= i of X_ik L_kj) X_jj,
// where X_ik is zero for k > i.
at::Tensor lower_inverse(LowerFactor& factor) {
  const int64_t n = factor.lower.size(0);
  at::Tensor inverse = at::zeros({n, n}, factor.lower.options());
  const DoubleView x = view_of(inverse), l = view_of(factor.lower);
  for (int64_t first = (n - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
    const int64_t width = std::min(kBlock, n - first), next = first + width;
    at::Tensor& diagonal = factor.diagonal_inverses[first / kBlock];
    inverse.slice(0, first, next).slice(1, first, next).copy_(diagonal);
    if (next == n) continue;
    at::Tensor panel = at::zeros({n - next, width}, inverse.options());
    subtract_product(view_of(panel), l.block(next, first), view_of(diagonal), false, n - next,
                     width, width);
    panel.neg_();
    for (int64_t row = next; row < n; row += kBlock) {
      const int64_t end = std::min(n, row + kBlock);
      subtract_product(x.block(row, first), x.block(row, next), view_of(panel), false, end - row,
                       width, end - next);
    }
  }
  return inverse;
}

// R[i, j] = X[n - 1 - i, n - 1 - j] for j >= i.
at::Tensor reversed_float(at::Tensor& inverse) {
  const int64_t n = inverse.size(0);
  at::Tensor factor = at::zeros({n, n}, at::kFloat);
  const double* x = data_of(inverse);
  float* r = factor.data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    const double* row = x + (n - 1 - i) * n;
    for (int64_t j = i; j < n; ++j) r[i * n + j] = static_cast<float>(row[n - 1 - j]);
  }
  return factor;
}

void check_diagonal(at::Tensor& factor, const std::string& what) {
  const int64_t n = factor.size(0);
  const float* r = factor.data_ptr<float>();
  for (int64_t j = 0; j < n; ++j)
    if (!(r[j * n + j] > 0) || !std::isfinite(r[j * n + j]))
      throw NumericalError(
          fmt::format("{}: the factor's diagonal is {} at input {}, outside float32's range; its "
                      "input is scaled beyond use: exclude the matrix (prune.exclude)",
                      what, r[j * n + j], j));
}

}  // namespace

at::Tensor inverse_factor(at::Tensor& gram, double damping, const std::string& what,
                          FactorReport& report) {
  const at::NoGradGuard no_gradients;
  report = {};
  const double mean = prepare(gram, what, report);
  LowerFactor lower = cholesky(gram, mean, damping, what, report);
  at::Tensor inverse = lower_inverse(lower);
  at::Tensor factor = reversed_float(inverse);
  check_diagonal(factor, what);
  return factor;
}

}  // namespace espalier::linalg
