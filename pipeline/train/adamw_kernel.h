#pragma once
/// The inner loop of AdamW, vectorised (Highway). Every instruction set gives the same bits: each
/// operation is rounded by itself, none is fused.

#include <cstdint>

namespace espalier::train {

/// What is the same for all elements of a step.
struct AdamwScalars {
  float keep;          ///< 1 - learning_rate * weight_decay
  float lerp1;         ///< 1 - beta1
  float beta2, rest2;  ///< rest2 = 1 - beta2
  float root2;         ///< sqrt(1 - beta2^step)
  float eps;
  float negative_step;  ///< -learning_rate / (1 - beta1^step)
};

/// Moves values[i] and both moments, i in [0, count), along gradient[i]. Four arrays are read,
/// three written.
void adamw_step(const AdamwScalars& scalars, float* values, const float* gradient,
                float* first_moment, float* second_moment, int64_t count);

}  // namespace espalier::train
