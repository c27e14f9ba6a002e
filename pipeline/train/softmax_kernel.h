#pragma once
/// One row of cross entropy, vectorised (Highway).

#include <cstdint>

namespace espalier::train {

/// log(sum exp(logits)) - logits[label]; logits float32 [vocabulary]. Two passes over the row.
double row_loss(const float* logits, int64_t vocabulary, int64_t label);

/// The same, and its gradient softmax(logits) - onehot(label): into `gradient` (bfloat16, round to
/// nearest even), or in place of the logits when `gradient` is null. The logits are overwritten.
double row_loss_and_gradient(float* logits, int64_t vocabulary, int64_t label, uint16_t* gradient);

}  // namespace espalier::train
