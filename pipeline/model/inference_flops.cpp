#include "pipeline/model/inference_flops.h"

#include <algorithm>
#include <set>

#include "pipeline/model/stored_layers.h"

namespace espalier::model {
namespace {

/// Names of all matrices that every token is multiplied with.
std::set<std::string> token_matrices(const Architecture& a) {
  std::set<std::string> names = {a.project_in, a.project_out};
  for (int64_t block = 0; block < a.blocks; ++block)
    for (const Linear& linear : a.linears) {
      names.insert(stored_weight_name(a, block, linear));
      for (const char* part : {".added.down", ".added.up", ".added.values"})
        names.insert(a.weight_name(block, linear) + part);
    }
  return names;
}

double seen_pairs(int64_t length, bool causal, int64_t window) {
  const auto n = static_cast<double>(length);
  if (!causal) return n * n;
  const auto w = static_cast<double>(window > 0 ? std::min(window, length) : length);
  return w * (w + 1) / 2 + (n - w) * w;
}

}  // namespace

InferenceFlops::InferenceFlops(const Architecture& a, const TensorCounts& counts,
                               const TensorCount& head)
    : head_(head), causal_(a.task == Task::causal), window_(a.sliding_window.value_or(0)) {
  for (const std::string& name : token_matrices(a)) {
    const auto found = counts.find(name);
    if (found == counts.end()) continue;
    token_.elements += found->second.elements;
    token_.nonzeros += found->second.nonzeros;
  }
  for (int64_t block = 0; block < a.blocks; ++block) {
    const auto features = static_cast<double>(a.heads_of(block).queries() * a.head_size);
    pair_ += 4 * features;
    if (!a.relative) continue;
    const int terms = a.relative->content_to_position + a.relative->position_to_content;
    const auto distances = static_cast<double>(2 * a.relative->span() * terms);
    distance_ += 2 * distances * features;
    once_ += 2 * distances * static_cast<double>(a.hidden) * features;
  }
}

Flops InferenceFlops::of(int64_t length, int64_t scored) const {
  const auto tokens = static_cast<double>(length), rows = static_cast<double>(scored);
  const double attention =
      pair_ * seen_pairs(length, causal_, window_) + distance_ * tokens + once_;
  const auto with = [&](int64_t of_token, int64_t of_head) {
    return 2 * tokens * static_cast<double>(of_token) + 2 * rows * static_cast<double>(of_head) +
           attention;
  };
  return {with(token_.elements, head_.elements), with(token_.nonzeros, head_.nonzeros)};
}

}  // namespace espalier::model
