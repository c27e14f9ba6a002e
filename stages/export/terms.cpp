#include "stages/export/terms.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/sequence_head.h"

namespace espalier::exporting {
namespace {

using nlohmann::json;
using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

std::map<std::string, model::AddedTerms> all_terms(const io::Checkpoint& checkpoint) {
  std::map<std::string, model::AddedTerms> all;
  for (const std::string& matrix : model::matrices_with_terms(checkpoint))
    if (const auto terms = model::load_terms(checkpoint, matrix)) all.emplace(matrix, *terms);
  return all;
}

/// The class that `transformers` makes of the export.
struct LoadedClass {
  std::string body;  ///< what it puts before the names of a checkpoint of the body alone: "bert."
  bool causal;       ///< predicts tokens; otherwise it has a head for sequences, or none

  /// "model.layers.0.self_attn.q_proj" of its weight's name.
  std::string module(const std::string& matrix) const {
    return body + matrix.substr(0, matrix.rfind(".weight"));
  }
};

LoadedClass loaded_class(const io::Checkpoint& checkpoint) {
  static const std::map<std::string, std::string> bodies = {
      {"bert", "bert."},        {"roberta", "roberta."}, {"deberta-v2", "deberta."},
      {"gpt2", "transformer."}, {"opt", "model."},       {"gpt_neox", "gpt_neox."}};
  const model::Architecture a = model::read_architecture(checkpoint);
  const bool decoder = a.task == model::Task::causal;
  const bool with_head = model::labels_of_head(checkpoint, a).has_value();
  const auto found = bodies.find(a.model_type);
  const bool alone = found != bodies.end() && !a.block_prefix.starts_with(found->second);
  return {alone && (decoder || with_head) ? found->second : "", decoder && !with_head};
}

json peft_config(const LoadedClass& loaded, const std::map<std::string, model::AddedTerms>& all) {
  json modules = json::array(), ranks = json::object();
  int64_t largest = 0;
  for (const auto& [matrix, terms] : all) {
    modules.push_back(loaded.module(matrix));
    ranks[loaded.module(matrix)] = terms.down.size(0);
    largest = std::max(largest, terms.down.size(0));
  }
  return {{"peft_type", "LORA"},
          // Of a task with a head peft asks for the head in the adapter's file: the dense model
          // beside it has it.
          {"task_type", loaded.causal ? json("CAUSAL_LM") : json(nullptr)},
          {"base_model_name_or_path", ".."},
          {"r", largest},
          {"lora_alpha", largest},
          {"rank_pattern", ranks},
          {"alpha_pattern", ranks},  // alpha = r: the scales are inside lora_B
          {"target_modules", modules},
          {"lora_dropout", 0.0},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"inference_mode", true}};
}

void write_peft(const io::Checkpoint& checkpoint, const std::filesystem::path& directory,
                const std::map<std::string, model::AddedTerms>& all) {
  const LoadedClass loaded = loaded_class(checkpoint);
  Tensors tensors;
  for (const auto& [matrix, terms] : all) {
    const std::string stem = "base_model.model." + loaded.module(matrix);
    tensors.emplace_back(stem + ".lora_A.weight", terms.down.contiguous());
    tensors.emplace_back(stem + ".lora_B.weight", (terms.up * terms.scale).contiguous());
  }
  io::write_safetensors(directory / "adapter_model.safetensors", tensors, io::export_metadata());
  io::write_file(directory / "adapter_config.json", peft_config(loaded, all).dump(2) + "\n");
}

void write_own(const std::filesystem::path& directory,
               const std::map<std::string, model::AddedTerms>& all) {
  Tensors tensors;
  for (const auto& [matrix, terms] : all) {
    const int64_t out = terms.up.size(0), in = terms.down.size(1);
    for (auto& part : model::stored_terms(matrix, terms, out, in))
      tensors.push_back(std::move(part));
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return a.second.element_size() > b.second.element_size();
  });
  io::write_safetensors(directory / "terms.safetensors", tensors, io::export_metadata());
}

}  // namespace

Terms write_terms(const io::Checkpoint& model, const std::filesystem::path& directory, bool write) {
  const std::filesystem::path adapter = directory / kAdapterFolder;
  const std::string folder = std::string(kAdapterFolder) + "/";
  const std::string config = folder + "adapter_config.json";
  const std::string products_file = folder + "adapter_model.safetensors";
  const std::string own_file = folder + "terms.safetensors";
  if (write)  // an earlier export's
    for (const std::string& file : {config, products_file, own_file})
      std::filesystem::remove(directory / file);
  const auto all = all_terms(model);
  if (all.empty()) return {};
  if (write) std::filesystem::create_directories(adapter);
  // A matrix that is stored as a part of another is no module that peft could adapt.
  const bool products = std::all_of(all.begin(), all.end(), [&](const auto& entry) {
    return model.has(entry.first) && entry.second.low_rank() && !entry.second.sparse() &&
           !entry.second.bias.defined();
  });
  if (products) {
    if (write) write_peft(model, adapter, all);
    return {{config, products_file},
            fmt::format("the adapter beside {} matrices is in {}, as peft loads it", all.size(),
                        adapter.string())};
  }
  if (write) write_own(adapter, all);
  return {
      {own_file},
      fmt::format("what stands beside {} matrices is in {}: it is more than low-rank products of "
                  "whole matrices, so no other library loads it; retrain with steps: 0, adapter: "
                  "previous and "
                  "merge: dense puts it into the matrices",
                  all.size(), (directory / own_file).string())};
}

}  // namespace espalier::exporting
