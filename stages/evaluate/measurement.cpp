#include "stages/evaluate/measurement.h"

#include <fmt/format.h>

#include <map>
#include <vector>

#include "pipeline/errors.h"

namespace espalier::evaluate {
namespace {

std::map<std::string, MeasurementFactory>& factories() {
  static std::map<std::string, MeasurementFactory> all;
  return all;
}

}  // namespace

MeasurementRegistration::MeasurementRegistration(const std::string& kind,
                                                 MeasurementFactory factory) {
  factories()[kind] = std::move(factory);
}

std::unique_ptr<Measurement> make_measurement(const std::string& name,
                                              const config::Section& section) {
  std::vector<std::string> kinds;
  for (const auto& [kind, factory] : factories()) kinds.push_back(kind);
  const std::string kind = section.choice("kind", kinds);
  auto measurement = factories().at(kind)(section);
  measurement->name = name;
  const auto file = section.optional_text("data");
  if (!file) section.fail("data", "is not set: an HDF5 file made by launch/prepare_data.py");
  measurement->file = *file;
  return measurement;
}

void require_language_model(const model::Architecture& architecture,
                            const std::filesystem::path& directory, const std::string& kind) {
  if (architecture.task != model::Task::causal || architecture.head.empty())
    throw UserError(fmt::format(
        "{}: {} is of causal language models; this is {}{}", directory.string(), kind,
        architecture.model_type,
        architecture.task == model::Task::causal ? " without an output embedding" : ""));
}

void add_flops(nlohmann::json& row, const model::InferenceFlops& flops,
               const std::vector<ScoredSequence>& sequences) {
  double dense = 0, nonzero = 0, tokens = 0;  // in the order of the sequences
  for (const ScoredSequence& sequence : sequences) {
    const model::Flops one = flops.of(sequence.length, sequence.scored);
    dense += one.dense;
    nonzero += one.nonzero;
    tokens += static_cast<double>(sequence.length);
  }
  const auto count = static_cast<double>(sequences.size());
  row["flops"] = dense / count;
  row["flops_of_nonzeros"] = nonzero / count;
  row["mean_length"] = tokens / count;
}

model::TensorCount output_embedding(const model::Architecture& architecture,
                                    const model::TensorCounts& counts) {
  const auto found = counts.find(architecture.head);
  return found == counts.end() ? model::TensorCount() : found->second;
}

void refuse_key(const config::Section& section, const std::string& key, const std::string& reader) {
  if (section.optional_integer(key).value_or(0) != 0)
    section.fail(key, fmt::format("is read by {} only; leave it out here", reader));
}

}  // namespace espalier::evaluate
