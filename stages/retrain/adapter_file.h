#pragma once
/// adapters.h5: the trained numbers of a retraining, to go on from or to apply to the same base.
///
/// /<parameter>          float32, under its name ("model.layers.3.self_attn.q_proj.weight/alpha")
/// /frozen/<name>        what the method needs beside them (bases, index sets, random matrices),
///                       with an attribute "type"
/// /head/<tensor>        a classification head, float32
/// attributes of "/":    method, settings (JSON of the method's keys), base_checksum

#include <filesystem>
#include <map>
#include <set>
#include <string>

#include "pipeline/train/adapters_h5.h"
#include "pipeline/train/parameters.h"
#include "stages/retrain/adapted_model.h"

namespace espalier::retrain {

using train::AdapterIdentity;

void write_adapters(const std::filesystem::path& file, const AdaptedModel& model,
                    const train::ParameterSet& parameters, const AdapterIdentity& identity);

class StoredAdapter {
 public:
  /// Reads the file whole; it is hostile. Throws UserError naming file and data set.
  static StoredAdapter read(const std::filesystem::path& file);

  const std::filesystem::path& file() const { return file_; }
  const AdapterIdentity& identity() const { return identity_; }
  const std::map<std::string, at::Tensor>& frozen() const { return frozen_; }
  /// What it adapts, and what else it trained but a head.
  const std::set<std::string>& matrices() const { return matrices_; }

  /// Throws UserError stating both sides unless it is of this method with settings of these values.
  void require_method(const std::string& method, const nlohmann::json& settings) const;
  /// Throws UserError with both checksums unless the base is this one.
  void require_base(const std::string& base_checksum, const std::string& model) const;

  /// Puts the stored values in the place of those at the start. The head is taken when it is wanted
  /// and every tensor of it fits, otherwise it starts as the model has it; returns whether it was
  /// taken. Throws UserError naming the parameter that is missing, left over or of another shape.
  bool copy_into(train::ParameterSet& parameters, const AdaptedModel& model,
                 bool with_head = true) const;
  /// The adapter being bound and prepared: throws UserError naming the first matrix beside which
  /// `checkpoint` holds something else than what the adapter would leave there.
  void require_beside(const AdaptedModel& model, const io::Checkpoint& checkpoint) const;

 private:
  std::filesystem::path file_;
  AdapterIdentity identity_;
  std::map<std::string, at::Tensor> values_, head_, frozen_;
  std::set<std::string> matrices_;
};

}  // namespace espalier::retrain
