#pragma once
/// What every retraining method is: trainable float32 numbers at chosen matrices of a frozen model.
///
/// A method is one file: it reads its own keys, says what its parameters are, how a matrix acts
/// with them, and what matrix is left when they are merged (or what stays beside it). It registers
/// itself, with its keys, under the name that `retrain.method` uses.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/config/section.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/architecture.h"
#include "pipeline/train/parameters.h"
#include "pipeline/workers.h"

namespace espalier::retrain {

/// What becomes of an adapter at the end.
enum class Merge {
  masked,  ///< into the matrix, a zero of the base stays one: in training as in the merge
  beside,  ///< it stays next to the frozen matrix
  dense    ///< into the matrix, zeros may be filled
};

/// A matrix that is adapted: y = x weight^T, and a bias that stays.
struct Target {
  std::string name;  ///< "model.layers.3.self_attn.q_proj.weight"
  int64_t block = 0;
  at::Tensor weight;  ///< [out, in], the model's type, frozen
  /// uint8 [out, in], 1 where the base is not 0. Defined only under Merge::masked and when the
  /// matrix has a zero: the adapter then acts as (changed weight) * kept.
  at::Tensor kept{};
  model::Role role = model::kUp;  ///< of the layer in its block
};

/// Which sequences x holds, for what is drawn anew in each step (dropout): equal for a sequence
/// whatever micro-batch, worker or rank it is in.
struct UnitKey {
  uint64_t seed = 0;
  int64_t step = 0, first_sequence = 0, sequences = 1;
  /// True while the loss is measured and not trained on: nothing is dropped.
  bool evaluating = false;
  int64_t counted = 0;  ///< labels of the unit that count: what its loss sum will be divided by
};

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// A method at work on one model. `target` counts the targets that attach() was given.
class Adapter {
 public:
  virtual ~Adapter() = default;

  /// The trainable tensors with their values at the start. A name begins with its target's
  /// ("model.layers.3.self_attn.q_proj.weight/alpha"): what adapters.h5 calls it.
  virtual std::vector<train::Parameter> initial_parameters(uint64_t seed) const = 0;
  /// The tensors to use from now on (views on one flat vector), in the same order. `parameters`
  /// may hold more behind them (norms, a head): those are not the adapter's.
  virtual void bind(const train::ParameterSet& parameters) = 0;

  /// Once before each step's units (and once before merging): whatever depends on the parameters
  /// and not on the inputs.
  virtual void prepare_step(Workers& workers) = 0;

  /// y[tokens, out] of x[tokens, in], in x's type; differentiable in x, in the parameters and in
  /// the bias where that requires a gradient. Called by several workers at once.
  virtual at::Tensor apply(int64_t target, const at::Tensor& x,
                           const std::optional<at::Tensor>& bias, const UnitKey& key) const = 0;

  /// The parameters that apply() of this target uses, by their index in the set.
  virtual std::vector<int64_t> parameters_of(int64_t target) const = 0;

  /// The adapted matrix [out, in], computed in float32 and rounded once to the model's type. Under
  /// Merge::masked it is 0 wherever the target's weight is.
  virtual at::Tensor merged(int64_t target) const = 0;
  /// What stays beside the frozen matrix; nothing when the change is no such sum.
  virtual std::optional<model::AddedTerms> beside(int64_t target) const {
    (void)target;
    return std::nullopt;
  }

  /// |H - I| (Frobenius) of each map that multiplies the target's weight, prepare_step done; none
  /// when the change is no product.
  virtual std::vector<double> map_distances(int64_t target) const {
    (void)target;
    return {};
  }

  /// What the parameters are useless without and no seed promises again: bases, index sets, shared
  /// random matrices. Stored in adapters.h5 and given back as AttachOptions::frozen. Names differ
  /// from the parameters'.
  virtual NamedTensors frozen_tensors() const { return {}; }
};

struct AttachOptions {
  Merge merge = Merge::masked;
  uint64_t seed = 0;
  Workers* workers = nullptr;                 ///< null: the calling thread alone
  const comm::Communicator* group = nullptr;  ///< null: this rank alone; attach is collective
  std::filesystem::path index_sets;           ///< of discover; empty: none was found or named
  /// What the adapter that this one starts from gave as frozen_tensors(); empty when it starts new.
  /// Used instead of anything the method would compute.
  std::map<std::string, at::Tensor> frozen;
};

/// A tensor of the model that is no matrix of a block's linear layers.
struct Site {
  enum class Kind { bias, norm_weight, norm_bias, embedding, matrix, head };
  Kind kind = Kind::bias;
  std::string name;    ///< "model.layers.3.input_layernorm.weight"
  int64_t block = -1;  ///< -1: before the first block; the number of blocks: behind the last
  std::vector<int64_t> shape;
};

/// A method as configured, before there is a model.
class AdapterMethod {
 public:
  virtual ~AdapterMethod() = default;

  /// Throws UserError naming the matrix when its shape does not fit, or what a file of the method's
  /// own keys says of it.
  virtual void check(const std::string& matrix, int64_t rows, int64_t columns) const = 0;
  /// The method's keys that give its parameters their meaning, as they were read: an adapter goes
  /// on under the same alone.
  virtual nlohmann::json settings() const = 0;
  /// True: a new adapter starts from AttachOptions::index_sets.
  virtual bool needs_index_sets() const { return false; }
  virtual std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                          const AttachOptions& options) const = 0;
  /// Trainable parameters of one matrix by the paper's formula.
  virtual int64_t trainable_parameters(int64_t rows, int64_t columns) const = 0;
  /// What the paper reports of them where that is another number (OFT: half).
  virtual int64_t reported_parameters(int64_t rows, int64_t columns) const {
    return trainable_parameters(rows, columns);
  }

  /// False: no matrix is adapted, attach() is given no targets, and only sites are trained.
  virtual bool adapts_matrices() const { return true; }
  /// True when the change is a sum that may stay beside the matrix (merge: beside).
  virtual bool additive() const { return false; }
  /// False: zeros stay zeros by the form of the change, and Target::kept is left undefined.
  virtual bool needs_kept() const { return true; }
  /// Whether this tensor is trained as a whole. The framework owns it then: a float32 parameter
  /// that starts at the frozen value and is written into the model at the end.
  virtual bool trains(const Site& site) const {
    (void)site;
    return false;
  }
};

/// Reads the method's own keys of the `retrain` section.
using AdapterFactory = std::function<std::unique_ptr<AdapterMethod>(const config::Section&)>;

/// const AdapterRegistration registration{"spp", read_spp, {"row_groups", "scale"}};
/// `keys` are those that the method reads and others may leave in the configuration.
struct AdapterRegistration {
  AdapterRegistration(const std::string& name, AdapterFactory factory,
                      const std::vector<std::string>& keys = {});
};
/// The registered names, sorted.
std::vector<std::string> adapter_names();
/// The keys of one method; those of all of them.
std::vector<std::string> adapter_keys(const std::string& method);
std::vector<std::string> adapter_keys();
/// Throws UserError listing the names when there is none of `name`.
std::unique_ptr<AdapterMethod> make_adapter_method(const std::string& name,
                                                   const config::Section& section);

}  // namespace espalier::retrain
