#pragma once
/// What a model said to each row or question, as JSON lines beside the metrics.

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "pipeline/driver/stage.h"

namespace espalier::evaluate {

/// Rank 0 writes `count` lines to <stage directory>/<task>.answers.jsonl, whole or not at all.
/// Returns the file's name.
std::string write_answers(const driver::StageContext& context, const std::string& task,
                          int64_t count, const std::function<nlohmann::json(int64_t)>& line);

}  // namespace espalier::evaluate
