#pragma once
/// Added low-rank and sparse terms: y = x (W + s (up down + P(values)))^T.
///
/// down float32 [r, in], up float32 [out, r]; P puts values[k] at the flat position positions[k] of
/// [out, in]. A method says what its parameters make of the three and takes the gradients back.
///
/// Where the target has a mask, (W + s dW) * kept is formed once a step: one product forward, two
/// backward, the weight gradient being reduced to the factors'. With dropout, y = x W^T +
/// dropout(x) (s dW * kept)^T, one product more each way. Without a mask the sum is never formed:
/// two thin products of r columns beside x W^T.

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "stages/retrain/adapted_matrix.h"

namespace espalier::retrain {

struct AddedOptions {
  double scale = 1;    ///< s
  double dropout = 0;  ///< of what the added terms read
  /// The mask is left out in training and applied once, by merged().
  bool mask_at_merge_only = false;
};

class AddedMatrix : public AdaptedMatrix {
 public:
  AddedMatrix(Target target, const AddedOptions& options, at::Tensor positions = {});

  void prepare() override;
  at::Tensor forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const override;
  Gradients backward(const at::Tensor& dy, const Saved& saved, const UnitKey& key,
                     bool x_wanted) const override;
  at::Tensor merged() const override;
  std::optional<model::AddedTerms> beside() const override;

 protected:
  struct Terms {
    at::Tensor down, up;  ///< float32
    at::Tensor values;    ///< float32 [positions]; undefined when there are none
  };
  /// The three from values().
  virtual Terms terms() const = 0;
  /// The gradients of values() from those of the terms.
  virtual std::vector<at::Tensor> pull_back(const Terms& gradient) const = 0;
  /// False: pull_back() does not read the gradient of `down`, which is frozen.
  virtual bool trains_down() const { return true; }

  const at::Tensor& positions() const { return positions_; }

 private:
  bool masked() const { return target().kept.defined() && !options_.mask_at_merge_only; }
  at::Tensor added() const;  ///< s dW, float32 [out, in]
  at::Tensor dropped(const at::Tensor& x, const UnitKey& key) const;
  Gradients backward_masked(const at::Tensor& dy, const Saved& saved, const UnitKey& key,
                            bool x_wanted) const;

  AddedOptions options_;
  at::Tensor positions_, position_rows_, position_columns_;  // int64
  Terms terms_;
  at::Tensor effective_;            // masked: in the model's type; with dropout only s dW * kept
  at::Tensor down_, up_, entries_;  // not masked: in the model's type, up and entries times s
};

}  // namespace espalier::retrain
