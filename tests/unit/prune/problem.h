#pragma once
/// Small pruning problems, and plain float64 pieces to hold the engine against.

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "pipeline/linalg/product.h"
#include "pipeline/random.h"
#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {

inline at::Tensor normals(const std::string& purpose, int64_t rows, int64_t columns) {
  const CounterRandom random(17, purpose);
  at::Tensor t = at::empty({rows, columns}, at::kFloat);
  for (int64_t i = 0; i < rows * columns; ++i)
    t.data_ptr<float>()[i] = static_cast<float>(random.normal(i));
  return t;
}

/// float64 [n, n] of correlated inputs of unequal size.
inline at::Tensor correlated_gram(int64_t n) {
  at::Tensor x = normals("tokens", 2 * n, n).to(at::kDouble);
  x = x + 0.7 * x.roll(1, 1) + 0.4 * x.roll(3, 1);
  x = x * at::linspace(0.3, 2, n, at::kDouble);
  return at::mm(x.t(), x);
}

inline MatrixTask task_of(const at::Tensor& weight, const Pattern& pattern, int64_t statistic = 0) {
  return {"block 0 q_proj", weight.clone(), statistic,
          at::full(weight.sizes(), 7, at::TensorOptions(at::kByte)), pattern};
}

struct Here {
  Workers workers{1, linalg::one_library_thread};
  comm::Communicator group = comm::Communicator::self();
};

inline const Pattern kTwoOfFour{2, 4, 0.5};
inline Pattern unstructured(double sparsity) { return {0, 0, sparsity}; }

/// bool, true where pruned: the pattern's smallest `score` (float64), by stable sorts.
inline at::Tensor plain_mask(const at::Tensor& score, const Pattern& pattern, int64_t count) {
  const at::Tensor flat = score.contiguous().flatten();
  const double* s = flat.const_data_ptr<double>();
  at::Tensor mask = at::zeros(flat.sizes(), at::kBool);
  const int64_t piece = pattern.unstructured() ? flat.numel() : pattern.group;
  const int64_t go = pattern.unstructured() ? count : pattern.group - pattern.keep;
  for (int64_t first = 0; first < flat.numel(); first += piece) {
    std::vector<int64_t> order(piece);
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s[a] < s[b]; });
    for (int64_t i = 0; i < go; ++i) mask.data_ptr<bool>()[order[i]] = true;
  }
  return mask.reshape(score.sizes());
}

/// The exact minimum of (x - w) G (x - w)^T over rows x that are 0 where pruned: normal equations.
inline at::Tensor plain_least_squares(const at::Tensor& weight, const at::Tensor& gram,
                                      const at::Tensor& pruned) {
  at::Tensor x = at::zeros_like(weight);
  for (int64_t row = 0; row < weight.size(0); ++row) {
    const at::Tensor kept = pruned[row].logical_not().nonzero().flatten();
    if (kept.numel() == 0) continue;
    const at::Tensor inner = gram.index_select(0, kept).index_select(1, kept);
    const at::Tensor right = gram.index_select(0, kept).mv(weight[row]);
    x[row].index_put_({kept}, at::linalg_solve(inner, right));
  }
  return x;
}

inline at::Tensor with_damping(const at::Tensor& gram, double damping) {
  return gram + at::eye(gram.size(0), gram.options()) * damping * gram.diagonal().mean();
}

/// tr (X - W) G (X - W)^T.
inline double squared_error(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gram) {
  const at::Tensor difference = x.to(at::kDouble) - weight;
  return (difference.mm(gram) * difference).sum().item<double>();
}

}  // namespace espalier::prune
