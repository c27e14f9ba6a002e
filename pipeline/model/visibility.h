#pragma once
/// Which keys each query of a sequence sees.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pipeline/model/attention.h"

namespace espalier::model {

/// Query i sees keys [first[i], last[i]).
struct Visibility {
  std::vector<int64_t> first, last;

  /// Of one sequence whose first `visible` tokens may be attended to.
  Visibility(int64_t length, int64_t visible, const AttentionShape& shape)
      : first(length), last(length) {
    for (int64_t i = 0; i < length; ++i) {
      last[i] = shape.causal ? std::min(i + 1, visible) : visible;
      first[i] = shape.sliding_window ? std::max<int64_t>(0, i + 1 - *shape.sliding_window) : 0;
      // A query behind the visible part (padding) keeps one key, so that its softmax exists.
      first[i] = std::min(first[i], last[i] - 1);
    }
  }
};

inline int64_t visible_of(const at::Tensor& visible, int64_t sequence, int64_t length) {
  return visible.defined() ? visible.const_data_ptr<int64_t>()[sequence] : length;
}

}  // namespace espalier::model
