#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "pipeline/config/compose.h"
#include "stages/retrain/adapter.h"
#include "stages/retrain/options.h"

namespace espalier::retrain {
namespace {

const auto kConfigs = std::filesystem::path(ESPALIER_SOURCE_DIR) / "configs";

std::vector<std::string> choices(const std::string& group) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(kConfigs / group))
    if (entry.path().extension() == ".yaml" && entry.path().stem() != "base")
      names.push_back(entry.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

/// Composes the choice and reads its retrain section as the stage does.
void expect_readable(const std::string& choice) {
  SCOPED_TRACE(choice);
  EXPECT_NO_THROW({
    const config::Section section =
        config::compose({kConfigs, "default", {choice}}).root().child("retrain");
    const RetrainOptions options = read_options(section);
    make_adapter_method(options.method, section);
    section.finish();
  });
}

TEST(Recipes, EveryRetrainingChoiceIsReadWithoutAWordLeft) {
  for (const std::string& name : choices("retrain")) expect_readable("retrain=" + name);
}

TEST(Recipes, EveryRowOfAPublicationIsReadWithoutAWordLeft) {
  for (const std::string& name : choices("recipe")) expect_readable("recipe=" + name);
}

TEST(Recipes, EveryMethodIsAChoice) {
  const std::vector<std::string> names = choices("retrain");
  const std::set<std::string> there(names.begin(), names.end());
  for (const std::string& method : adapter_names())
    EXPECT_TRUE(there.count(method)) << method << " has no file in configs/retrain";
}

}  // namespace
}  // namespace espalier::retrain
