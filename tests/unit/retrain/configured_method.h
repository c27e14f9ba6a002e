#pragma once
/// A retraining method as the shipped configuration and some overrides make it.

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/config/compose.h"
#include "stages/retrain/adapter.h"

namespace espalier::retrain {

inline std::unique_ptr<AdapterMethod> configured(std::vector<std::string> overrides) {
  const auto directory = std::filesystem::path(ESPALIER_SOURCE_DIR) / "configs";
  const config::Section section =
      config::compose({directory, "default", std::move(overrides)}).root().child("retrain");
  return make_adapter_method(section.text("method"), section);
}

}  // namespace espalier::retrain
