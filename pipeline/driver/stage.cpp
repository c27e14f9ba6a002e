#include "pipeline/driver/stage.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>

#include "pipeline/errors.h"
#include "pipeline/io/json.h"

namespace espalier::driver {
namespace {

std::map<std::string, StageFactory>& factories() {
  static std::map<std::string, StageFactory> all;
  return all;
}

}  // namespace

bool EarlierEntry::leaves_adapter() const {
  return kind == "retrain" && io::text_at(settings, {"merge"}) == "beside";
}

StageRegistration::StageRegistration(const std::string& name, StageFactory factory) {
  factories()[name] = std::move(factory);
}

std::unique_ptr<Stage> make_stage(const std::string& name, const config::Section& section) {
  const auto found = factories().find(name);
  if (found == factories().end()) {
    std::vector<std::string> names;
    for (const auto& [known, factory] : factories()) names.push_back(known);
    throw UserError(
        fmt::format("pipeline: \"{}\" is no stage; there are {}. A node of another name "
                    "says which it is: {}: {{stage: prune, ...}}",
                    name, fmt::join(names, ", "), name));
  }
  return found->second(section);
}

}  // namespace espalier::driver
