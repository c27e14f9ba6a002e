#include "pipeline/model/sequence_head.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/json.h"
#include "pipeline/random.h"

namespace espalier::model {
namespace {

using Pooling = SequenceHead::Pooling;

constexpr size_t kMostBytes = size_t{1} << 20;  // of labels.json

/// Where a family keeps its head. `dense` is empty where nothing is pooled.
struct Layout {
  Pooling pooling = Pooling::last_token;
  std::string dense, classifier;
  bool bias = false;
};

std::string config_path(const io::Checkpoint& checkpoint) {
  return (checkpoint.root() / "config.json").string();
}

Pooling deberta_pooling(const ConfigReader& config) {
  const std::string name = config.text_or("pooler_hidden_act", "gelu");
  if (name == "gelu") return Pooling::first_token_gelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Pooling::first_token_gelu_tanh;
  if (name == "tanh") return Pooling::first_token_tanh;
  config.fail("pooler_hidden_act \"" + name +
              "\" is not one espalier knows: gelu, gelu_new, gelu_pytorch_tanh, tanh");
}

std::optional<Layout> layout_of(const io::Checkpoint& checkpoint, const Architecture& a) {
  if (a.task == Task::causal) return Layout{Pooling::last_token, "", "score", false};
  if (a.model_type == "bert") {
    // The pooler is the encoder's own: it stands under its prefix, where it has one.
    const std::string prefix = a.token_embedding.substr(0, a.token_embedding.find("embeddings."));
    return Layout{Pooling::first_token_tanh, prefix + "pooler.dense", "classifier", true};
  }
  if (a.model_type == "roberta")
    return Layout{Pooling::first_token_tanh, "classifier.dense", "classifier.out_proj", true};
  if (a.model_type == "deberta-v2")
    return Layout{deberta_pooling({checkpoint.config(), config_path(checkpoint)}), "pooler.dense",
                  "classifier", true};
  return std::nullopt;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

/// Features that the classifier reads: a decoder's score stands where its output embedding does.
int64_t classifier_width(const Architecture& a) {
  return a.task == Task::causal ? a.embedding_size : a.hidden;
}

/// The class that config.json names; empty when it names none.
std::string class_name(const nlohmann::json& config) {
  const auto found = config.find("architectures");
  const bool named =
      found != config.end() && found->is_array() && !found->empty() && (*found)[0].is_string();
  return named ? (*found)[0].get<std::string>() : "";
}

/// Whether the tensor that bears the classifier's name is one: the model's class says so, or a
/// stage of espalier has put it there.
bool is_classifier(const io::Checkpoint& checkpoint, const std::string& name) {
  const std::string named = class_name(checkpoint.config());
  if (!named.ends_with("ForTokenClassification") && !named.ends_with("ForMultipleChoice"))
    return true;
  const io::Checkpoint root = io::Checkpoint::open(checkpoint.root());
  return !root.has(name) || root.tensor_checksum(name) != checkpoint.tensor_checksum(name);
}

/// The checkpoint's tensor with its rows in the order `rows` (undefined: as they are), or a drawn
/// one.
HeadTensor load_or_draw(const io::Checkpoint& checkpoint, const std::string& name,
                        const std::vector<int64_t>& shape, uint64_t seed, bool draw,
                        const at::Tensor& rows = {}) {
  if (!draw && checkpoint.has(name)) {
    if (checkpoint.info(name).shape != shape)
      throw UserError(
          fmt::format("{}: tensor {} of the classification head has shape {}, {} is "
                      "asked for",
                      checkpoint.directory().string(), name,
                      shape_text(checkpoint.info(name).shape), shape_text(shape)));
    HeadTensor tensor{name, checkpoint.view(name).to(at::kFloat, false, /*copy=*/true), false};
    checkpoint.drop(name);
    if (rows.defined()) tensor.value = tensor.value.index_select(0, rows);
    return tensor;
  }
  HeadTensor tensor{name, at::zeros(shape, at::kFloat), true};
  if (shape.size() == 1) return tensor;
  const ConfigReader config(checkpoint.config(), config_path(checkpoint));
  const double deviation = config.number_or("initializer_range", 0.02);
  const CounterRandom random(seed, "head", stream_of(name));
  float* value = tensor.value.data_ptr<float>();
  for (int64_t i = 0; i < tensor.value.numel(); ++i)
    value[i] = static_cast<float>(deviation * random.normal(static_cast<uint64_t>(i)));
  return tensor;
}

/// "Llama" of LlamaForCausalLM, "GPT2" of GPT2LMHeadModel, "Bert" of BertModel; else empty.
std::string family_name(const std::string& class_name) {
  for (const char* end : {"For", "LMHeadModel", "DoubleHeadsModel", "Model"})
    if (const size_t at = class_name.rfind(end); at != std::string::npos && at > 0)
      return class_name.substr(0, at);
  return "";
}

std::vector<std::string> names_in_config(const nlohmann::json& config, int64_t labels) {
  const auto found = config.find("id2label");
  if (found == config.end() || !found->is_object() || static_cast<int64_t>(found->size()) != labels)
    return {};
  std::vector<std::string> names;
  for (int64_t i = 0; i < labels; ++i) {
    const auto name = found->find(std::to_string(i));
    if (name == found->end() || !name->is_string()) return {};
    names.push_back(*name);
  }
  return names;
}

std::vector<std::string> names_in_file(const std::filesystem::path& file, int64_t labels) {
  const nlohmann::json content = io::parse_json(io::read_file(file, kMostBytes), file.string());
  const auto found = content.is_object() ? content.find("labels") : content.end();
  const bool list =
      found != content.end() && found->is_array() &&
      std::all_of(found->begin(), found->end(), [](const auto& name) { return name.is_string(); });
  if (!list || (!found->empty() && static_cast<int64_t>(found->size()) != labels))
    throw UserError(fmt::format("{}: \"labels\" with the names of {} labels is expected",
                                file.string(), labels));
  return *found;
}

/// How names are compared; empty for one that says nothing.
std::string plain_name(const std::string& name) {
  std::string plain;
  for (const char c : name) {
    const bool between = c == ' ' || c == '-';
    plain += between ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  const size_t digits = plain.starts_with("label_") ? 6 : 0;
  const bool number = plain.find_first_not_of("0123456789", digits) == std::string::npos;
  return number ? "" : plain;
}

/// For each of `names` its place among `theirs`. Undefined where the order is the same, or where
/// one of both names no classes; nullopt where they name other classes.
std::optional<at::Tensor> rows_by_name(const std::vector<std::string>& theirs,
                                       const std::vector<std::string>& names) {
  std::vector<std::string> there;
  for (const std::string& name : theirs) there.push_back(plain_name(name));
  std::vector<int64_t> rows;
  for (const std::string& name : names) {
    const auto found = std::find(there.begin(), there.end(), plain_name(name));
    rows.push_back(found == there.end() ? -1 : found - there.begin());
    if (plain_name(name).empty()) return at::Tensor();
  }
  if (names.empty() || there.empty() || std::find(there.begin(), there.end(), "") != there.end())
    return at::Tensor();
  const at::Tensor order = at::tensor(rows, at::kLong);
  const at::Tensor straight = at::arange(static_cast<int64_t>(rows.size()), at::kLong);
  if (at::equal(order, straight)) return at::Tensor();
  if (!at::equal(std::get<0>(order.sort()), straight)) return std::nullopt;
  return order;
}

/// int64 [sequences]: the row of hidden_states that speaks for each sequence.
at::Tensor pooled_rows(Pooling pooling, const UnitShape& unit) {
  at::Tensor rows = at::arange(unit.sequences, at::kLong) * unit.length;
  if (pooling != Pooling::last_token) return rows;
  return unit.visible.defined() ? rows + unit.visible - 1 : rows + (unit.length - 1);
}

}  // namespace

std::vector<std::string> SequenceHead::created() const {
  std::vector<std::string> names;
  for (const HeadTensor& tensor : tensors)
    if (tensor.created) names.push_back(tensor.name);
  return names;
}

std::vector<at::Tensor> SequenceHead::values() const {
  std::vector<at::Tensor> all;
  for (const HeadTensor& tensor : tensors) all.push_back(tensor.value);
  return all;
}

std::optional<int64_t> labels_of_head(const io::Checkpoint& checkpoint, const Architecture& a) {
  const std::optional<Layout> layout = layout_of(checkpoint, a);
  if (!layout) return std::nullopt;
  const std::string name = layout->classifier + ".weight";
  if (!checkpoint.has(name) || !is_classifier(checkpoint, name)) return std::nullopt;
  const std::vector<int64_t>& shape = checkpoint.info(name).shape;
  if (shape.size() != 2 || shape[0] < 1 || shape[1] != classifier_width(a))
    throw UserError(fmt::format("{}: tensor {} has shape {}; [labels, {}] is expected",
                                checkpoint.directory().string(), name, shape_text(shape),
                                classifier_width(a)));
  return shape[0];
}

std::vector<std::string> label_names(const io::Checkpoint& checkpoint, const Architecture& a) {
  const std::optional<int64_t> labels = labels_of_head(checkpoint, a);
  if (!labels) return {};
  if (const auto file = io::nearest_file(checkpoint.chain(), kLabelsFile))
    return names_in_file(*file, *labels);
  return names_in_config(checkpoint.config(), *labels);
}

void write_label_names(const std::filesystem::path& directory,
                       const std::vector<std::string>& names) {
  io::write_file(directory / kLabelsFile, nlohmann::json({{"labels", names}}).dump() + "\n");
}

ClassNames class_names(const io::Checkpoint& checkpoint) {
  const std::optional<Architecture> architecture = supported_architecture(checkpoint);
  if (!architecture || !labels_of_head(checkpoint, *architecture)) return std::nullopt;
  return label_names(checkpoint, *architecture);
}

std::vector<std::string> names_after_training(const io::Checkpoint& checkpoint,
                                              const Architecture& a,
                                              const std::vector<std::string>& names) {
  const bool telling = std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return !plain_name(name).empty();
  });
  const auto labels = static_cast<int64_t>(names.size());
  return telling || labels_of_head(checkpoint, a) != labels ? names : label_names(checkpoint, a);
}

SequenceHead load_sequence_head(const io::Checkpoint& checkpoint, const Architecture& a,
                                int64_t labels, uint64_t seed, bool replace,
                                const std::vector<std::string>& names) {
  const std::optional<Layout> layout = layout_of(checkpoint, a);
  if (!layout)
    throw UserError(fmt::format(
        "{}: espalier knows no classification head of {}; it knows those of bert, roberta, "
        "deberta-v2 and of decoders",
        config_path(checkpoint), a.model_type));
  const std::optional<int64_t> there = labels_of_head(checkpoint, a);
  const bool other = there && *there != labels;
  if (other && !replace)
    throw UserError(fmt::format(
        "{}: the classification head has {} labels, the data {}; take the model that was trained "
        "on this task",
        checkpoint.directory().string(), *there, labels));
  const std::vector<std::string> theirs =
      other ? std::vector<std::string>() : label_names(checkpoint, a);
  const std::optional<at::Tensor> rows = rows_by_name(theirs, names);
  if (!rows && !replace)
    throw UserError(fmt::format(
        "{}: the classification head tells {} apart, the data {}; take the model that was trained "
        "on this task, or retrain before",
        checkpoint.directory().string(), fmt::join(theirs, ", "), fmt::join(names, ", ")));
  const bool draw = !there || other || !rows;
  SequenceHead head{layout->pooling, labels, {}};
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape) {
    head.tensors.push_back(load_or_draw(checkpoint, name, shape, seed, false));
  };
  const auto add_rows = [&](const std::string& name, const std::vector<int64_t>& shape) {
    head.tensors.push_back(
        load_or_draw(checkpoint, name, shape, seed, draw, rows.value_or(at::Tensor())));
  };
  if (!layout->dense.empty()) {
    add(layout->dense + ".weight", {a.hidden, a.hidden});
    add(layout->dense + ".bias", {a.hidden});
  }
  add_rows(layout->classifier + ".weight", {labels, classifier_width(a)});
  if (layout->bias) add_rows(layout->classifier + ".bias", {labels});
  return head;
}

std::optional<std::string> pooler_weight(const io::Checkpoint& checkpoint, const Architecture& a) {
  const std::optional<Layout> layout = layout_of(checkpoint, a);
  if (!layout || layout->dense.empty()) return std::nullopt;
  const std::string name = layout->dense + ".weight";
  if (!checkpoint.has(name) || checkpoint.info(name).shape != std::vector{a.hidden, a.hidden})
    return std::nullopt;
  return name;
}

at::Tensor sequence_logits(const SequenceHead& head, const std::vector<at::Tensor>& parameters,
                           const at::Tensor& hidden_states, const UnitShape& unit) {
  at::Tensor x = hidden_states.index_select(0, pooled_rows(head.pooling, unit)).to(at::kFloat);
  if (head.pooling == Pooling::last_token) return at::linear(x, parameters.at(0));
  x = at::linear(x, parameters.at(0), parameters.at(1));
  x = head.pooling == Pooling::first_token_tanh
          ? at::tanh(x)
          : at::gelu(x, head.pooling == Pooling::first_token_gelu ? "none" : "tanh");
  return at::linear(x, parameters.at(2), parameters.at(3));
}

at::Tensor sequence_loss(const at::Tensor& logits, const at::Tensor& labels, Problem problem) {
  const at::Tensor wide = logits.to(at::kDouble);
  if (problem == Problem::classification)
    return at::cross_entropy_loss(wide, labels, {}, at::Reduction::Sum, /*ignore_index=*/-100);
  const at::Tensor labelled = labels.isnan().logical_not();
  const at::Tensor difference = wide.view({-1}) - at::nan_to_num(labels, 0.0);
  return at::where(labelled, difference.square(), at::zeros_like(difference)).sum();
}

std::optional<nlohmann::json> config_of_head(const io::Checkpoint& checkpoint,
                                             const Architecture& a) {
  const std::optional<int64_t> labels = labels_of_head(checkpoint, a);
  if (!labels) return std::nullopt;
  const nlohmann::json& config = checkpoint.config();
  // transformers' own rule: one label is a number.
  nlohmann::json keys = {
      {"problem_type", *labels == 1 ? "regression" : "single_label_classification"}};
  // Without it transformers takes the class by model_type.
  if (const std::string family = family_name(class_name(config)); !family.empty())
    keys["architectures"] = nlohmann::json::array({family + "ForSequenceClassification"});
  const std::vector<std::string> names = label_names(checkpoint, a);
  for (int64_t i = 0; i < *labels; ++i) {
    const std::string name = names.empty() ? fmt::format("LABEL_{}", i) : names[i];
    keys["id2label"][std::to_string(i)] = name;
    keys["label2id"][name] = i;
  }
  // Decoders find the last token by the padding's number; without one they take one row at a time.
  const auto absent = [&](const char* key) {
    return !config.contains(key) || config[key].is_null();
  };
  if (a.task == Task::causal && absent("pad_token_id") && !absent("eos_token_id"))
    keys["pad_token_id"] =
        config["eos_token_id"].is_array() ? config["eos_token_id"].at(0) : config["eos_token_id"];
  return keys;
}

}  // namespace espalier::model
