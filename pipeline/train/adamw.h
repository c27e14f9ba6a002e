#pragma once
/// AdamW (arXiv 1711.05101) in float32 with decoupled weight decay, operation by operation as
/// torch.optim.AdamW(foreach=False) does it. One thread, elementwise: every rank that is given the
/// same sums gets the same bits.

#include <cstdint>
#include <span>
#include <vector>

namespace espalier::train {

struct AdamwOptions {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
};

/// First and second moments of a flat vector of parameters.
class Adamw {
 public:
  Adamw(int64_t size, AdamwOptions options);

  /// Moves values[begin, begin + count) along their gradient; `step` counts from 1. A step is one
  /// call for each range, so that ranges may have their own learning rates.
  void update(std::span<float> values, std::span<const float> gradient, int64_t begin,
              double learning_rate, int64_t step);

  std::span<float> first_moment() { return first_; }
  std::span<float> second_moment() { return second_; }

 private:
  AdamwOptions options_;
  std::vector<float> first_, second_;
};

/// Euclidean norm in float64, summed in the order of the index.
double gradient_norm(std::span<const float> gradient);
/// Scales the gradient to at most max_norm as torch.nn.utils.clip_grad_norm_ does (factor
/// max_norm / (norm + 1e-6), at most 1); returns the norm before. max_norm <= 0 leaves it.
double clip_gradient(std::span<float> gradient, double max_norm);

}  // namespace espalier::train
