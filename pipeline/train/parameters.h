#pragma once
/// The trained numbers of a run: one flat float32 vector, with a named view for every tensor.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace espalier::train {

struct Parameter {
  std::string name;             ///< "model.layers.3.self_attn.q_proj.weight/alpha"
  at::Tensor value;             ///< float32, a leaf that asks for its gradient
  double learning_rate_factor;  ///< 1, or head_learning_rate / learning_rate
  int64_t offset = 0;           ///< of the first element in flat()
};

class ParameterSet {
 public:
  /// Copies the values (float32) into one vector; `values` are replaced by views on it.
  explicit ParameterSet(std::vector<Parameter> parameters);

  const std::vector<Parameter>& parameters() const { return parameters_; }
  int64_t size() const { return flat_.numel(); }  ///< trainable numbers
  std::span<float> flat();
  std::span<const float> flat() const;

 private:
  std::vector<Parameter> parameters_;
  at::Tensor flat_;
};

}  // namespace espalier::train
