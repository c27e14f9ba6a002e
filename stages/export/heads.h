#pragma once
/// How a model that lost heads is written for a program that knows no missing heads.

#include <nlohmann/json.hpp>
#include <string>

#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"

namespace espalier::exporting {

struct HeadsExport {
  io::Checkpoint model;        ///< what to write
  nlohmann::json config_keys;  ///< for config.json; an object
  std::string sentence;        ///< for a person; empty when no head is missing
};

/// Where config.json can say it, the heads stay absent: families that state head_dim, every block
/// with as many query and key/value heads, shared evenly, in numbers that the family's class in
/// `transformers` takes. Elsewhere their rows and columns come
/// back as zeros, which gives the same outputs: written below the stage's state, one block in
/// memory at a time, blocks dealt over ranks. Collective.
HeadsExport export_heads(const driver::StageContext& context, const io::Checkpoint& model);

}  // namespace espalier::exporting
