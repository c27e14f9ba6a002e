#include "pipeline/config/repository.h"

#include <algorithm>
#include <sstream>

#include "pipeline/config/yaml_file.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr size_t kMaximumFiles = 1000;

[[noreturn]] void fail(const Origin& origin, const std::string& message) {
  throw UserError(origin.describe() + ": " + message);
}

/// "name@package", "/name".
void split_name(const std::string& written, DefaultsEntry& entry) {
  size_t at = written.find('@');
  entry.name = written.substr(0, at);
  if (at != std::string::npos) entry.package = written.substr(at + 1);
  if (entry.name.starts_with("/")) {
    entry.absolute = true;
    entry.name.erase(0, 1);
  }
}

bool is_text(const Node& node) {
  return node.kind == Kind::text || node.kind == Kind::interpolation;
}

void read_choices(const Node& value, DefaultsEntry& entry) {
  if (is_text(value)) {
    entry.choices = {value.text};
  } else if (value.kind == Kind::null) {
    entry.is_null = true;
  } else if (value.kind == Kind::missing) {
    entry.is_missing = true;
  } else if (value.kind == Kind::list) {
    entry.is_list = true;
    for (const auto& item : value.items) {
      if (!is_text(*item))
        fail(item->origin, "a choice in a list is a text, found " + describe_value(*item));
      entry.choices.push_back(item->text);
    }
  } else {
    fail(value.origin, "the choice of " + entry.name + " is a text or a list of texts, found " +
                           describe_value(value) + "; quote it if it is a name");
  }
}

DefaultsEntry read_entry(const Node& node) {
  DefaultsEntry entry;
  entry.origin = node.origin;
  if (is_text(node)) {
    split_name(node.text, entry);
    if (entry.name == "_self_") {
      if (entry.package) fail(node.origin, "_self_ takes no package");
      entry.kind = DefaultsEntry::Kind::self;
    }
    return entry;
  }
  if (node.kind != Kind::mapping || node.entries.size() != 1) {
    fail(node.origin, "an element of the defaults list is a name or one \"group: choice\", found " +
                          describe_value(node));
  }
  entry.kind = DefaultsEntry::Kind::group;
  std::istringstream words(node.entries[0].first.text);
  std::string word, group;
  while (words >> word) {
    if (!group.empty()) {
      entry.optional |= group == "optional";
      entry.override |= group == "override";
    }
    group = word;
  }
  split_name(group, entry);
  read_choices(*node.entries[0].second, entry);
  return entry;
}

std::vector<DefaultsEntry> read_defaults(const Node& list) {
  if (list.kind != Kind::list) {
    fail(list.origin, "defaults is a list of \"- group: choice\", found " + describe_value(list));
  }
  std::vector<DefaultsEntry> entries;
  bool has_self = false, has_other = false;  // other than overrides
  const DefaultsEntry* first_override = nullptr;
  entries.reserve(list.items.size() + 1);
  for (const auto& item : list.items) {
    DefaultsEntry entry = read_entry(*item);
    if (entry.name == "hydra" || entry.name.starts_with("hydra/")) {
      fail(
          entry.origin,
          "the group hydra configures Hydra itself, which espalier does not use; remove this line");
    }
    bool is_self = entry.kind == DefaultsEntry::Kind::self;
    if (is_self && has_self) fail(entry.origin, "_self_ stands twice in this defaults list");
    has_self |= is_self;
    has_other |= !entry.override;
    if (first_override && !entry.override && !is_self) {
      fail(first_override->origin, "override " + first_override->name + " stands before " +
                                       entry.name +
                                       "; overrides stand at the end of the defaults list");
    }
    entries.push_back(std::move(entry));
    if (entries.back().override && !first_override) first_override = &entries.back();
  }
  if (!has_self && has_other) {  // Hydra's default place: after everything else
    DefaultsEntry self;
    self.kind = DefaultsEntry::Kind::self;
    self.name = "_self_";
    self.origin = list.origin;
    entries.push_back(self);
  }
  return entries;
}

}  // namespace

Repository::Repository(std::filesystem::path directory) : directory_(std::move(directory)) {
  if (!std::filesystem::is_directory(directory_)) {
    throw UserError(directory_.string() +
                    ": no such directory; name the one with the configurations: --config-dir DIR");
  }
}

const ConfigFile* Repository::load(const std::string& path) {
  std::string name = path.ends_with(".yaml") ? path : path + ".yaml";
  if (auto found = files_.find(name); found != files_.end()) return &found->second;
  std::filesystem::path file = directory_ / name;
  bool has_name = !path.empty() && !path.ends_with("/");
  std::error_code error;
  if (!has_name || !std::filesystem::is_regular_file(file, error)) return nullptr;
  if (files_.size() >= kMaximumFiles)
    throw UserError(file.string() + ": more than 1000 files in one configuration");
  YamlFile yaml = read_yaml_file(file);
  ConfigFile config{.content = yaml.root, .package = yaml.package, .defaults = {}};
  if (NodePtr defaults = yaml.root->find("defaults")) {
    config.defaults = read_defaults(*defaults);
    yaml.root->erase(Key{"defaults"});
  }
  return &files_.emplace(name, std::move(config)).first->second;
}

bool Repository::has_group(const std::string& group) const {
  std::error_code error;
  return !group.empty() && std::filesystem::is_directory(directory_ / group, error);
}

std::vector<std::string> Repository::choices(const std::string& group) const {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& item : std::filesystem::directory_iterator(directory_ / group, error)) {
    if (item.path().extension() == ".yaml" && item.is_regular_file(error))
      names.push_back(item.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> Repository::groups() const {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& item : std::filesystem::recursive_directory_iterator(directory_, error)) {
    if (!item.is_directory(error)) continue;
    std::string name = std::filesystem::relative(item.path(), directory_, error).generic_string();
    if (!choices(name).empty()) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace espalier::config
