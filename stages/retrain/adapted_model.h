#pragma once
/// A frozen model in memory with an adapter at some of its matrices, and whatever else is trained
/// (norms, embeddings, a classification head): loss and gradients of one unit on one thread.

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/data/sampler.h"
#include "pipeline/data/sequence_batch.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/block.h"
#include "pipeline/model/sequence_head.h"
#include "pipeline/train/loop.h"
#include "stages/retrain/adapter.h"
#include "stages/retrain/selection.h"

namespace espalier::retrain {

/// The sequences of a unit, of a language model's text or of a labelled set.
struct UnitBatch {
  at::Tensor tokens;       ///< int64 [sequences, length]
  at::Tensor labels;       ///< the next token at each position; or [sequences], classes or numbers
  at::Tensor visible;      ///< int64 [sequences]: tokens before the padding; undefined: all
  at::Tensor token_types;  ///< int64 [sequences, length], or undefined

  UnitBatch(const data::Batch& batch)  // NOLINT: meant to convert
      : tokens(batch.tokens), labels(batch.labels) {}
  UnitBatch(const data::SequenceBatch& batch)  // NOLINT
      : tokens(batch.tokens),
        labels(batch.labels),
        visible(batch.visible),
        token_types(batch.token_types) {}
};

struct ModelOptions {
  std::vector<std::string> targets;  ///< globs; empty: all that the method trains
  AttachOptions attach;
  /// Leaves out what an earlier adapter left beside the targets: this one goes on from it.
  bool without_terms = false;
  /// Trained instead of predicting the next token; on top of the last hidden states.
  std::optional<model::SequenceHead> head;
  model::Problem problem = model::Problem::classification;
  double head_rate_factor = 1;  ///< head_learning_rate / learning_rate

  ModelOptions() = default;
  ModelOptions(std::vector<std::string> targets)  // NOLINT: meant to convert
      : targets(std::move(targets)) {}
};

class AdaptedModel {
 public:
  /// Loads every block: 2 bytes a weight in bfloat16, and what the method keeps beside it.
  /// Collective when options.attach has a group.
  AdaptedModel(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
               at::ScalarType dtype, const AdapterMethod& method, const ModelOptions& options);
  AdaptedModel(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
               at::ScalarType dtype, const AdapterMethod& method,
               const std::vector<std::string>& targets, const AttachOptions& attach);

  /// Makes the parameters, with their values at the start, and binds the adapter to them: the
  /// adapter's, then the sites', then the head's. Before anything below.
  std::unique_ptr<train::ParameterSet> make_parameters(uint64_t seed);
  Adapter& adapter() { return *adapter_; }
  const Adapter& adapter() const { return *adapter_; }
  const std::vector<Target>& targets() const { return targets_; }
  const model::Architecture& architecture() const { return architecture_; }
  at::ScalarType dtype() const { return dtype_; }
  const std::optional<model::SequenceHead>& head() const { return head_; }
  /// Of the parameters: where the sites and the head begin.
  int64_t first_site_parameter() const { return first_site_; }
  int64_t first_head_parameter() const { return first_site_ + static_cast<int64_t>(sites_.size()); }
  const std::vector<PlacedSite>& sites() const { return sites_; }
  const at::Tensor& parameter(int64_t index) const { return parameter_values_[index]; }
  /// Whether what an earlier adapter left beside the targets is left out.
  bool without_terms() const { return without_terms_; }
  int64_t head_size() const;  ///< numbers of the head
  /// The head's tensors as they are trained now, float32, in the order of SequenceHead.
  std::vector<at::Tensor> head_parameters() const;

  /// Loss sum of a batch and the gradient of every parameter, given to `sink` block by block from
  /// the last one: no graph spans two blocks. With `recompute` (activation checkpointing) only the
  /// blocks' inputs are kept, and each block runs a second time on the way back. Throws
  /// NumericalError naming block and step where hidden states stop being finite.
  train::UnitLoss loss_and_gradients(const UnitBatch& batch, const UnitKey& key, bool recompute,
                                     const train::GradientSink& sink) const;

  /// [tokens, hidden] behind the last norm (where there is one), with the parameters as they are.
  at::Tensor hidden_states(const UnitBatch& batch, const UnitKey& key) const;

  struct Evaluation {
    train::UnitLoss loss;
    at::Tensor logits;  ///< float32 [sequences, labels] of a head; otherwise undefined
  };
  Evaluation evaluate(const UnitBatch& batch, const UnitKey& key) const;
  /// What stands around the blocks, as it is trained now, in the model's type.
  model::Ends ends() const { return current_ends(false); }

 private:
  struct Pass;
  Pass make_pass(const UnitBatch& batch, const UnitKey& key) const;
  at::Tensor forward_block(int64_t block, const at::Tensor& hidden_states, const Pass& pass) const;
  /// The ends with the trained tensors in their places, as leaves' casts when `with_graph`.
  model::Ends current_ends(bool with_graph) const;
  at::Tensor backward_head(const at::Tensor& hidden_states, const UnitBatch& batch,
                           train::UnitLoss& loss, const train::GradientSink& sink,
                           at::Tensor& tied_gradient) const;
  at::Tensor backward_sequence_head(const at::Tensor& hidden_states, const UnitBatch& batch,
                                    const Pass& pass, train::UnitLoss& loss,
                                    const train::GradientSink& sink) const;
  /// DeBERTa's relative positions as they are trained now; undefined where they are frozen.
  at::Tensor trained_relative(bool with_graph) const;
  void backward_embedding(const at::Tensor& embedded, const at::Tensor& gradient,
                          const at::Tensor& tied_gradient, const train::GradientSink& sink) const;
  void backward_relative(const at::Tensor& relative, const at::Tensor& gradient,
                         const train::GradientSink& sink) const;
  train::UnitLoss sequence_loss_of(const at::Tensor& logits, const UnitBatch& batch) const;
  [[noreturn]] void fail_not_finite(const Pass& pass, const at::Tensor& last, double loss) const;

  model::Architecture architecture_;
  at::ScalarType dtype_;
  model::Ends ends_;
  model::RelativeEmbeddings relative_;
  std::vector<model::BlockWeights> blocks_;
  std::vector<Target> targets_;
  std::vector<std::array<int64_t, model::kRoles>> target_of_;  // [block][role], -1: not adapted
  std::vector<PlacedSite> sites_;
  std::vector<std::vector<int64_t>> sites_of_;       // [block]
  std::vector<int64_t> front_sites_, behind_sites_;  // before the first block, behind the last
  std::vector<int64_t> relative_sites_;              // DeBERTa's, read by every block
  std::optional<model::SequenceHead> head_;
  model::Problem problem_;
  std::vector<at::Tensor> head_kept_;
  double head_rate_factor_;
  bool without_terms_;
  std::vector<std::vector<int64_t>> parameters_of_;  // [block]
  int64_t first_trained_ = 0;  // the first block that the gradient has to reach
  int64_t first_site_ = 0;     // index of the first site's parameter
  std::unique_ptr<Adapter> adapter_;
  std::vector<at::Tensor> parameter_values_;
};

}  // namespace espalier::retrain
