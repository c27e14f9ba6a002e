#pragma once
/// What every retraining method is: trainable float32 numbers at chosen matrices of a frozen model.
///
/// A method is one file: it reads its own keys, says what its parameters are, how a matrix acts with
/// them, and what matrix is left when they are merged. It registers itself under the name that
/// `retrain.method` uses.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/train/parameters.h"
#include "pipeline/workers.h"

namespace espalier::retrain {

/// A matrix that is adapted: y = x weight^T.
struct Target {
  std::string name;  ///< "model.layers.3.self_attn.q_proj.weight"
  int64_t block = 0;
  at::Tensor weight;  ///< [out, in], the model's type, frozen
};

/// Which sequences x holds, for what is drawn anew in each step (dropout): equal for a sequence
/// whatever micro-batch, worker or rank it is in.
struct UnitKey {
  uint64_t seed = 0;
  int64_t step = 0, first_sequence = 0, sequences = 1;
};

/// A method at work on one model. `target` counts the targets that attach() was given.
class Adapter {
 public:
  virtual ~Adapter() = default;

  /// The trainable tensors with their values at the start.
  virtual std::vector<train::Parameter> initial_parameters(uint64_t seed) const = 0;
  /// The tensors to use from now on (views on one flat vector), in the same order.
  virtual void bind(const train::ParameterSet& parameters) = 0;

  /// Once before each step's units (and once before merging): whatever depends on the parameters
  /// and not on the inputs.
  virtual void prepare_step(Workers& workers) = 0;

  /// y[tokens, out] of x[tokens, in], in x's type; differentiable in x and in the parameters. Called
  /// by several workers at once.
  virtual at::Tensor apply(int64_t target, const at::Tensor& x,
                           const std::optional<at::Tensor>& bias, const UnitKey& key) const = 0;

  /// The parameters that apply() of this target uses, by their index in the set.
  virtual std::vector<int64_t> parameters_of(int64_t target) const = 0;

  /// The adapted matrix [out, in], computed in float32 and rounded once to the model's type.
  virtual at::Tensor merged(int64_t target) const = 0;
};

/// A method as configured, before there is a model.
class AdapterMethod {
 public:
  virtual ~AdapterMethod() = default;
  /// Throws UserError naming the matrix when its shape does not fit.
  virtual void check(const std::string& matrix, int64_t rows, int64_t columns) const = 0;
  virtual std::unique_ptr<Adapter> attach(std::vector<Target> targets) const = 0;
};

/// Reads the method's own keys of the `retrain` section.
using AdapterFactory = std::function<std::unique_ptr<AdapterMethod>(const config::Section&)>;

/// const AdapterRegistration registration{"spp", read_spp};
struct AdapterRegistration {
  AdapterRegistration(const std::string& name, AdapterFactory factory);
};
/// The registered names, sorted.
std::vector<std::string> adapter_names();
/// Throws UserError listing the names when there is none of `name`.
std::unique_ptr<AdapterMethod> make_adapter_method(const std::string& name,
                                                   const config::Section& section);

}  // namespace espalier::retrain
