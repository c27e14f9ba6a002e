#pragma once
/// The head that gives a sequence one row of logits, as the ...ForSequenceClassification models of
/// transformers have it: encoders pool their first token through a dense layer (BERT tanh, RoBERTa
/// tanh, DeBERTa-v2 its pooler's activation) and a classifier with bias; decoders score the last
/// token before the padding by one matrix without bias.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/block.h"

namespace espalier::model {

/// What the logits are for: one class a sequence, or one number (as many as labels).
enum class Problem { classification, regression };

inline constexpr const char* kLabelsFile = "labels.json";

struct HeadTensor {
  std::string name;      ///< in the checkpoint: "bert.pooler.dense.weight"
  at::Tensor value;      ///< float32
  bool created = false;  ///< drawn here, as the checkpoint has none
};

struct SequenceHead {
  enum class Pooling { last_token, first_token_tanh, first_token_gelu, first_token_gelu_tanh };
  Pooling pooling = Pooling::last_token;
  int64_t labels = 0;
  /// dense weight [hidden, hidden] and bias [hidden] where the first token is pooled, then the
  /// classifier's weight [labels, hidden] and, for encoders, bias [labels].
  std::vector<HeadTensor> tensors;

  std::vector<std::string> created() const;  ///< names of the tensors that were drawn
  std::vector<at::Tensor> values() const;
};

/// Rows of the checkpoint's classifier; nullopt when it has none, or when config.json names a class
/// of another task that calls its head the same (BertForTokenClassification, ...) and no stage has
/// trained another. Throws UserError when it is no matrix over the hidden states.
std::optional<int64_t> labels_of_head(const io::Checkpoint& checkpoint,
                                      const Architecture& architecture);

/// What the classes of the checkpoint's head are called, in the order of its rows: labels.json in
/// the nearest directory of the chain that has one, {"labels": ["entailment", ...]}, else id2label
/// of config.json. Empty where nothing says it.
std::vector<std::string> label_names(const io::Checkpoint& checkpoint,
                                     const Architecture& architecture);
/// Writes labels.json beside the tensors of a derived model; no names say that there are none.
void write_label_names(const std::filesystem::path& directory,
                       const std::vector<std::string>& names);
/// label_names() of a model on which a head was trained for classes of these names: theirs, unless
/// they name nothing ("0", "1") and the head had as many labels before.
std::vector<std::string> names_after_training(const io::Checkpoint& checkpoint,
                                              const Architecture& architecture,
                                              const std::vector<std::string>& names);
/// In the order of the head's rows, empty where nothing names them; nullopt without a head.
using ClassNames = std::optional<std::vector<std::string>>;
/// label_names() of any checkpoint; of one that espalier cannot run as of one without a head.
ClassNames class_names(const io::Checkpoint& checkpoint);

/// The head with `labels` rows: what the checkpoint has of it is loaded, the rest drawn as
/// transformers draws it: weights N(0, initializer_range), counter-based by (seed, tensor name),
/// biases 0. Where both the checkpoint and `names` (of the labels, in their order) really name the
/// classes ("LABEL_1" and "1" name none), the rows come in the order of `names`; case, spaces, "-"
/// and "_" are not compared. With `replace` a classifier of another number or of other names of
/// labels is drawn anew; without, it is an error (UserError with both), as is an encoder whose head
/// espalier does not know.
SequenceHead load_sequence_head(const io::Checkpoint& checkpoint, const Architecture& architecture,
                                int64_t labels, uint64_t seed, bool replace = false,
                                const std::vector<std::string>& names = {});

/// The weight [hidden, hidden] of the dense layer that pools an encoder's first token
/// ("bert.pooler.dense.weight"); nullopt where the checkpoint or the family has none.
std::optional<std::string> pooler_weight(const io::Checkpoint& checkpoint,
                                         const Architecture& architecture);

/// float32 logits [sequences, labels]. `parameters` are the head's tensors in their order
/// (float32); hidden_states [sequences * length, hidden], any type, behind the final norm where
/// there is one. Differentiable in parameters and hidden_states.
at::Tensor sequence_logits(const SequenceHead& head, const std::vector<at::Tensor>& parameters,
                           const at::Tensor& hidden_states, const UnitShape& unit);

/// Cross entropy or squared error, summed in float64 over the sequences that have a label (the mean
/// is the caller's, over the whole batch). labels [sequences]: int64 with -100 for none, or
/// float64 with NaN for none. A regression has one label a sequence. Differentiable in logits.
at::Tensor sequence_loss(const at::Tensor& logits, const at::Tensor& labels, Problem problem);

/// The keys of config.json that a checkpoint with this head needs beside its own: architectures
/// (where it names a class of the family), id2label and label2id by label_names() or LABEL_0, ...,
/// problem_type, and for decoders pad_token_id. nullopt without a head.
std::optional<nlohmann::json> config_of_head(const io::Checkpoint& checkpoint,
                                             const Architecture& architecture);

}  // namespace espalier::model
