#pragma once
/// A frozen causal model in memory with an adapter at some of its matrices: loss and gradients of
/// one unit on one thread.

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/data/sampler.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/block.h"
#include "pipeline/train/loop.h"
#include "stages/retrain/adapter.h"

namespace espalier::retrain {

/// The linear layers of a block that `targets` name: by the last part of their name ("q_proj",
/// "*_proj") or the whole of it ("self_attn.*"); all when it is empty.
/// Throws UserError listing the layers there are when one of `targets` matches none.
std::vector<const model::Linear*> matching_layers(const model::Architecture& architecture,
                                                  const std::vector<std::string>& targets);

class AdaptedModel {
 public:
  /// Loads every block: 2 bytes a weight in bfloat16, and what the method keeps beside it.
  AdaptedModel(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
               at::ScalarType dtype, const AdapterMethod& method,
               const std::vector<std::string>& targets, const AttachOptions& options = {});

  /// Makes the parameters, with their values at the start, and binds the adapter to them. Before
  /// anything below.
  std::unique_ptr<train::ParameterSet> make_parameters(uint64_t seed);
  Adapter& adapter() { return *adapter_; }
  const std::vector<Target>& targets() const { return targets_; }

  /// Loss sum of a batch and the gradient of every adapter parameter, given to `sink` block by
  /// block from the last one: no graph spans two blocks. With `recompute` (activation
  /// checkpointing) only the blocks' inputs are kept, and each block runs a second time on the way
  /// back. Throws NumericalError naming block and step where hidden states stop being finite.
  train::UnitLoss loss_and_gradients(const data::Batch& batch, const UnitKey& key, bool recompute,
                                     const train::GradientSink& sink) const;

 private:
  struct Pass;
  at::Tensor forward_block(int64_t block, const at::Tensor& hidden_states, const Pass& pass) const;
  at::Tensor backward_head(const at::Tensor& hidden_states, const data::Batch& batch,
                           train::UnitLoss& loss) const;
  [[noreturn]] void fail_not_finite(const Pass& pass, const at::Tensor& last, double loss) const;

  model::Architecture architecture_;
  model::Ends ends_;
  std::vector<model::BlockWeights> blocks_;
  std::vector<Target> targets_;
  std::vector<std::array<int64_t, model::kRoles>> target_of_;  // [block][role], -1: not adapted
  std::vector<std::vector<int64_t>> parameters_of_;            // [block]
  int64_t first_adapted_ = 0;
  std::unique_ptr<Adapter> adapter_;
  std::vector<at::Tensor> parameter_values_;
};

}  // namespace espalier::retrain
