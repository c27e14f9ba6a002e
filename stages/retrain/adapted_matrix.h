#pragma once
/// An adapter whose matrices know nothing of each other: what a method has to say of one of them.
///
/// A method derives from AdaptedMatrix, or from one of the two ready forms: AddedMatrix (added.h,
/// W + dW) and TurnedMatrix (turned.h, H W H). make_matrix_adapter() makes an Adapter of them.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "stages/retrain/adapter.h"

namespace espalier::retrain {

/// What the forward pass of a unit leaves for its backward pass.
using Saved = std::vector<at::Tensor>;

class AdaptedMatrix {
 public:
  struct Gradients {
    at::Tensor x;                        ///< in x's type; undefined when it was not asked for
    std::vector<at::Tensor> parameters;  ///< float32, in the order of initial()
  };

  explicit AdaptedMatrix(Target target) : target_(std::move(target)) {
    target_.weight = target_.weight.contiguous();
  }
  virtual ~AdaptedMatrix() = default;
  AdaptedMatrix(const AdaptedMatrix&) = delete;
  AdaptedMatrix& operator=(const AdaptedMatrix&) = delete;

  /// The parameters with their values at the start.
  virtual std::vector<train::Parameter> initial(uint64_t seed) const = 0;
  /// The values to use from now on: float32, in the order of initial(), changed in place by steps.
  void bind(std::vector<at::Tensor> values) { values_ = std::move(values); }
  /// What forward, backward and merged read is derived from the values: once a step.
  virtual void prepare() = 0;

  /// y[tokens, out] of x[tokens, in], without the bias. No autograd in here.
  virtual at::Tensor forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const = 0;
  virtual Gradients backward(const at::Tensor& dy, const Saved& saved, const UnitKey& key,
                             bool x_wanted) const = 0;

  // As Adapter has them.
  virtual at::Tensor merged() const = 0;
  virtual std::optional<model::AddedTerms> beside() const { return std::nullopt; }
  virtual std::vector<double> map_distances() const { return {}; }
  virtual NamedTensors frozen() const { return {}; }

  const Target& target() const { return target_; }

 protected:
  const std::vector<at::Tensor>& values() const { return values_; }
  at::ScalarType type() const { return target_.weight.scalar_type(); }
  int64_t rows() const { return target_.weight.size(0); }
  int64_t columns() const { return target_.weight.size(1); }

 private:
  Target target_;
  std::vector<at::Tensor> values_;
};

std::unique_ptr<Adapter> make_matrix_adapter(std::vector<std::unique_ptr<AdaptedMatrix>> matrices);

/// A method that adapts every matrix by itself.
class MatrixMethod : public AdapterMethod {
 public:
  std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                  const AttachOptions& options) const override;

 protected:
  virtual std::unique_ptr<AdaptedMatrix> make(Target target,
                                              const AttachOptions& options) const = 0;
};

/// Throws UserError naming the matrix when retrain.adapter_rank exceeds its smaller side.
void check_rank(const std::string& matrix, int64_t rows, int64_t columns, int64_t rank);

/// The stored tensor `name` of the adapter that this one starts from, nullptr when it starts new.
/// Throws UserError when one is started from and has none, or another type or shape.
const at::Tensor* frozen_tensor(const AttachOptions& options, const std::string& name,
                                at::ScalarType type, at::IntArrayRef shape);

/// round((W + added) * kept) in W's type; without W when `with_weight` is false, without mask when
/// `kept` is undefined. added: float32 [out, in].
at::Tensor sum_inside(const at::Tensor& weight, const at::Tensor& added, const at::Tensor& kept,
                      bool with_weight = true);

/// dy^T x as float32 [out, in], zero outside `kept` (everything is kept when it is undefined).
at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& kept);

}  // namespace espalier::retrain
