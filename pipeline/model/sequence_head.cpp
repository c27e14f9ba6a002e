#include "pipeline/model/sequence_head.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::model {
namespace {

using Pooling = SequenceHead::Pooling;

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

/// The checkpoint's tensor, or a drawn one.
HeadTensor load_or_draw(const io::Checkpoint& checkpoint, const std::string& name,
                        const std::vector<int64_t>& shape, uint64_t seed, bool draw) {
  if (!draw && checkpoint.has(name)) {
    if (checkpoint.info(name).shape != shape)
      throw UserError(
          fmt::format("{}: tensor {} of the classification head has shape {}, {} is "
                      "asked for",
                      checkpoint.directory().string(), name,
                      shape_text(checkpoint.info(name).shape), shape_text(shape)));
    HeadTensor tensor{name, checkpoint.view(name).to(at::kFloat, false, /*copy=*/true), false};
    checkpoint.drop(name);
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

/// "Llama" of LlamaForCausalLM, "GPT2" of GPT2LMHeadModel, "Bert" of BertModel.
std::string family_name(const nlohmann::json& config, const std::string& where) {
  const auto found = config.find("architectures");
  if (found != config.end() && found->is_array() && !found->empty() && (*found)[0].is_string()) {
    const std::string name = (*found)[0];
    for (const char* end : {"For", "LMHeadModel", "DoubleHeadsModel", "Model"})
      if (const size_t at = name.rfind(end); at != std::string::npos && at > 0)
        return name.substr(0, at);
  }
  throw UserError(where +
                  ": architectures names no model class as transformers writes it, so the "
                  "class of its classification model is unknown; add it, for example "
                  "\"architectures\": [\"LlamaForCausalLM\"]");
}

/// The names of the labels that config.json has, when they are as many; else LABEL_0, LABEL_1, ...
nlohmann::json label_names(const nlohmann::json& config, int64_t labels) {
  const auto found = config.find("id2label");
  if (found != config.end() && found->is_object() &&
      static_cast<int64_t>(found->size()) == labels) {
    bool whole = true;
    for (int64_t i = 0; i < labels; ++i) {
      const auto name = found->find(std::to_string(i));
      whole = whole && name != found->end() && name->is_string();
    }
    if (whole) return *found;
  }
  nlohmann::json names = nlohmann::json::object();
  for (int64_t i = 0; i < labels; ++i) names[std::to_string(i)] = fmt::format("LABEL_{}", i);
  return names;
}

/// int64 [sequences]: the row of hidden_states that speaks for each sequence.
at::Tensor pooled_rows(Pooling pooling, const UnitShape& unit) {
  at::Tensor rows = at::arange(unit.sequences, at::kLong) * unit.length;
  if (pooling != Pooling::last_token) return rows;
  return unit.visible.defined() ? rows + unit.visible - 1 : rows + (unit.length - 1);
}

}  // namespace

std::vector<at::Tensor> SequenceHead::values() const {
  std::vector<at::Tensor> all;
  for (const HeadTensor& tensor : tensors) all.push_back(tensor.value);
  return all;
}

std::optional<int64_t> labels_of_head(const io::Checkpoint& checkpoint, const Architecture& a) {
  const std::optional<Layout> layout = layout_of(checkpoint, a);
  if (!layout) return std::nullopt;
  const std::string name = layout->classifier + ".weight";
  if (!checkpoint.has(name)) return std::nullopt;
  const std::vector<int64_t>& shape = checkpoint.info(name).shape;
  if (shape.size() != 2 || shape[0] < 1 || shape[1] != classifier_width(a))
    throw UserError(fmt::format("{}: tensor {} has shape {}; [labels, {}] is expected",
                                checkpoint.directory().string(), name, shape_text(shape),
                                classifier_width(a)));
  return shape[0];
}

SequenceHead load_sequence_head(const io::Checkpoint& checkpoint, const Architecture& a,
                                int64_t labels, uint64_t seed, bool replace) {
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
  SequenceHead head{layout->pooling, labels, {}};
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape, bool draw) {
    head.tensors.push_back(load_or_draw(checkpoint, name, shape, seed, draw));
  };
  if (!layout->dense.empty()) {
    add(layout->dense + ".weight", {a.hidden, a.hidden}, false);
    add(layout->dense + ".bias", {a.hidden}, false);
  }
  add(layout->classifier + ".weight", {labels, classifier_width(a)}, other);
  if (layout->bias) add(layout->classifier + ".bias", {labels}, other);
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
  nlohmann::json keys = {
      {"architectures", nlohmann::json::array({family_name(config, config_path(checkpoint)) +
                                               "ForSequenceClassification"})},
      {"id2label", label_names(config, *labels)},
      // transformers' own rule: one label is a number.
      {"problem_type", *labels == 1 ? "regression" : "single_label_classification"}};
  for (const auto& [number, name] : keys["id2label"].items())
    keys["label2id"][name.get<std::string>()] = std::stoll(number);
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
