#include "pipeline/config/compose.h"

#include <algorithm>
#include <map>

#include "pipeline/config/defaults.h"
#include "pipeline/config/merge.h"
#include "pipeline/config/nearest.h"
#include "pipeline/config/override.h"
#include "pipeline/config/print.h"
#include "pipeline/config/repository.h"
#include "pipeline/config/resolve.h"
#include "pipeline/errors.h"

namespace espalier::config {

struct Composition::State {
  NodePtr tree;
  std::vector<DefaultsRow> rows;
  std::vector<Override> overrides;

  NodePtr resolved(bool keep_missing) const { return Resolver(tree, keep_missing).resolved(tree); }
};

namespace {

void refuse_hydra(const Override& override) {
  const std::string& key = override.key;
  if (key == "hydra" || key.starts_with("hydra.") || key.starts_with("hydra/")) {
    throw UserError(override.origin().describe() +
                    ": hydra.* configures Hydra itself, which espalier does not use; the run's "
                    "directory is run.dir");
  }
}

void refuse_sweep(const Override& override) {
  if (!override.value.holds_sweep()) return;
  throw UserError(override.origin().describe() +
                  ": this value is a sweep, which needs --multirun; a list is written [a,b], a "
                  "text with commas 'a,b'");
}

std::vector<Override> parse_all(const Request& request) {
  std::vector<Override> overrides;
  for (const auto& text : request.overrides) {
    overrides.push_back(parse_override(text));
    refuse_hydra(overrides.back());
  }
  return overrides;
}

std::string padded(std::string text, size_t width) {
  text.resize(std::max(width, text.size()), ' ');
  return text;
}

}  // namespace

Composition compose(const Request& request) {
  auto state = std::make_shared<Composition::State>();
  Repository repository(request.directory);
  state->overrides = parse_all(request);
  for (const auto& override : state->overrides) refuse_sweep(override);
  state->rows = expand_defaults(repository, request.name, state->overrides);
  state->tree = make_node(Kind::mapping);
  for (const auto& row : state->rows) merge_package(state->tree, row.file->content, row.package);
  if (NodePtr hydra = state->tree->find("hydra")) {
    throw UserError(
        hydra->origin.describe() +
        ": hydra: the key configures Hydra itself, which espalier does not use; remove it");
  }
  for (const auto& override : state->overrides) {
    if (!is_group_override(repository, override)) apply_override(state->tree, override);
  }
  return Composition(state);
}

Section Composition::root() const { return Section(state_->resolved(true), ""); }

std::string Composition::yaml(bool resolved) const {
  return to_yaml(resolved ? *state_->resolved(false) : *state_->tree);
}

std::string Composition::json(bool resolved) const {
  return to_json(resolved ? *state_->resolved(false) : *state_->tree, false);
}

std::string Composition::defaults_list() const {
  std::vector<std::vector<std::string>> table = {{"Config path", "Package", "_self_", "Parent"}};
  for (const auto& row : state_->rows) {
    table.push_back({row.config, row.package, row.is_self ? "True" : "False", row.parent});
  }
  std::vector<size_t> widths(4, 0);
  for (const auto& row : table) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  size_t whole = 4 * 3 + 2;
  for (size_t width : widths) whole += width;
  std::string line(whole, '-');
  std::string text = "\nDefaults List\n*************\n";
  for (size_t i = 0; i < table.size(); ++i) {
    for (size_t j = 0; j < 4; ++j) text += "| " + padded(table[i][j], widths[j]) + " ";
    text += "| \n";
    if (i == 0) text += line + "\n";
  }
  return text + line + "\n";
}

std::string Composition::override_dirname(
    const std::function<bool(const std::string& key)>& excluded) const {
  std::vector<std::string> inputs;
  for (const auto& override : state_->overrides)
    if (!excluded || !excluded(override.key)) inputs.push_back(override.input);
  std::sort(inputs.begin(), inputs.end());
  return join(inputs, ",");
}

std::string describe_groups(const std::filesystem::path& directory) {
  Repository repository(directory);
  std::string text = "== Configurations (--config-name NAME) ==\n";
  text += join(repository.choices(""), ", ") + "\n\n== Groups (group=choice) ==\n";
  for (const auto& group : repository.groups()) {
    std::vector<std::string> choices = repository.choices(group);
    std::erase(choices, "base");  // what the choices of a group share, and none itself
    text += group + ": " + join(choices, ", ") + "\n";
  }
  text += "\n== Keys (key=value) ==\n";
  try {
    Request request;
    request.directory = directory;
    text += compose(request).yaml(false);
  } catch (const UserError& error) {
    text += std::string("not composed: ") + error.what() + "\n";
  }
  return text;
}

}  // namespace espalier::config
