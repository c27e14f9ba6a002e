#pragma once
/// One entry of evaluate.tasks: a kind of measurement on a data set. A kind is one file that
/// registers itself; adding one needs no line elsewhere.

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/inference_flops.h"

namespace espalier::evaluate {

class Measurement {
 public:
  virtual ~Measurement() = default;
  /// What can be refused before any work, against the model the run starts from. Throws UserError.
  virtual void check(const driver::RunContext& run, const model::Architecture& architecture,
                     const std::filesystem::path& start_model) const = 0;
  /// The task's row of metrics ("kind", the figures, what they were taken of, add_flops).
  /// `counts`: of the checkpoint's parameters. Collective.
  virtual nlohmann::json measure(driver::StageContext& context, const io::Checkpoint& checkpoint,
                                 const model::Architecture& architecture,
                                 const model::TensorCounts& counts) const = 0;

  /// Part of the stage's key: another text where the same model and data give other figures.
  virtual std::string numerics() const { return {}; }

  /// What measure() will score: "perplexity of 20 segments of 2048 tokens". check() has passed.
  virtual std::string plan() const = 0;

  std::string name;            ///< the key under evaluate.tasks
  std::filesystem::path file;  ///< the data set it reads
};

/// Reads the kind's own keys. `kind` and `data` are read by make_measurement.
using MeasurementFactory = std::function<std::unique_ptr<Measurement>(const config::Section&)>;

/// const MeasurementRegistration registration{"perplexity", make};
struct MeasurementRegistration {
  MeasurementRegistration(const std::string& kind, MeasurementFactory factory);
};

/// Throws UserError placed at `kind` that lists the kinds there are.
std::unique_ptr<Measurement> make_measurement(const std::string& name,
                                              const config::Section& section);

/// Throws UserError unless the model predicts tokens from those before them.
void require_language_model(const model::Architecture& architecture,
                            const std::filesystem::path& directory, const std::string& kind);

/// A sequence that is scored: its tokens without padding, and how many rows the head is applied to.
struct ScoredSequence {
  int64_t length = 0, scored = 1;
};
/// Adds to a task's row, as means over its sequences: "flops" of one (inference_flops.h),
/// "flops_of_nonzeros", and "mean_length".
void add_flops(nlohmann::json& row, const model::InferenceFlops& flops,
               const std::vector<ScoredSequence>& sequences);
/// The output embedding of a language model.
model::TensorCount output_embedding(const model::Architecture& architecture,
                                    const model::TensorCounts& counts);

/// Refuses a key that another kind reads, unless it is left as it stands in the files: null or 0.
void refuse_key(const config::Section& section, const std::string& key, const std::string& reader);

}  // namespace espalier::evaluate
