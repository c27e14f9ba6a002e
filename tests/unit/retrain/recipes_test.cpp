#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <tuple>

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

TEST(Recipes, OfDseeSetBothTrainingsOfItsConfiguration) {
  struct Row {
    const char* recipe;
    int64_t validated_first, epochs, validated_again;
    double first_rate, second_rate;
  };
  for (const Row& row :
       {Row{"dsee_rte", 50, 10, 100, 5e-4, 5e-4}, Row{"dsee_rte_heads", 50, 8, 100, 5e-4, 6e-4},
        Row{"dsee_sst2", 1000, 5, 100, 2e-4, 2e-4}}) {
    SCOPED_TRACE(row.recipe);
    const auto composition =
        config::compose({kConfigs,
                         "dsee",
                         {std::string("recipe=") + row.recipe, "evaluate.tasks.labels.data=dev.h5",
                          "prune.pattern=heads", "prune.heads=8"}});
    const config::Section first = composition.root().child("retrain"),
                          second = composition.root().child("retrain_again");
    for (const auto& [section, rate, every] :
         {std::tuple(first, row.first_rate, row.validated_first),
          std::tuple(second, row.second_rate, row.validated_again)}) {
      EXPECT_EQ(section.number("learning_rate"), rate);
      EXPECT_EQ(section.child("validate").integer("every"), every);
      EXPECT_EQ(section.child("validate").text("metric"), "accuracy");
      EXPECT_EQ(section.child("validate").text("data"), "dev.h5");
    }
    EXPECT_EQ(first.text("adapter"), "new");
    EXPECT_EQ(second.text("adapter"), "previous");
    EXPECT_EQ(second.integer("epochs"), row.epochs);
  }
}

TEST(Recipes, EveryMethodIsAChoice) {
  const std::vector<std::string> names = choices("retrain");
  const std::set<std::string> there(names.begin(), names.end());
  for (const std::string& method : adapter_names())
    EXPECT_TRUE(there.count(method)) << method << " has no file in configs/retrain";
}

}  // namespace
}  // namespace espalier::retrain
