#include "pipeline/config/defaults.h"

#include <algorithm>
#include <map>
#include <memory>

#include "pipeline/config/interpolation.h"
#include "pipeline/config/nearest.h"
#include "pipeline/config/resolve.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr int kMaximumDepth = 64;
constexpr size_t kMaximumNodes = 10000;

std::string dotted(std::string path) {
  std::replace(path.begin(), path.end(), '/', '.');
  return path;
}

std::string join_with(const std::string& a, const std::string& b, char separator) {
  return a.empty() ? b : b.empty() ? a : a + separator + b;
}

std::string directory_of(const std::string& path) {
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash);
}

bool is_interpolated(const std::string& text) { return text.find("${") != std::string::npos; }

/// An element of a defaults list at its place in the tree.
struct TreeNode {
  DefaultsEntry entry;
  std::string base;  ///< the group of the file that lists it
  std::string parent_package;
  std::string parent;     ///< the file that lists it
  bool deferred = false;  ///< waits for the choices that its name refers to
  bool skipped = false;

  struct File {
    std::string config, package;
    const ConfigFile* file;
    std::vector<std::unique_ptr<TreeNode>> children;
  };
  std::vector<File> files;  ///< one a choice

  std::string path() const {
    return entry.absolute ? entry.name : join_with(base, entry.name, '/');
  }
  std::string group() const {
    return entry.kind == DefaultsEntry::Kind::group ? path() : directory_of(path());
  }

  /// The package without regard to a file's header.
  std::string package() const {
    std::string written_group =
        entry.kind == DefaultsEntry::Kind::group ? entry.name : directory_of(entry.name);
    std::string package = entry.package.value_or(dotted(written_group));
    if (package == "_here_") return parent_package;
    if (size_t at = package.find("_group_"); entry.package && at != std::string::npos) {
      return package.replace(at, 7, dotted(group()));
    }
    if (package == "_global_") return "";
    if (package.starts_with("_global_.")) return package.substr(9);
    return join_with(parent_package, package, '.');
  }

  /// What an override calls this group: "db", "db@package" when the package is not the usual one.
  std::string override_key() const {
    std::string usual = dotted(path()), actual = package();
    if (usual == actual) return path();
    return path() + "@" + (actual.empty() ? "_global_" : actual);
  }
};

std::string header_package(const std::string& header) {
  if (header == "_global_") return "";
  return header.starts_with("_global_.") ? header.substr(9) : header;
}

struct GroupOverride {
  std::vector<std::string> choices = {};
  bool is_list = false, is_null = false, external = false, used = false;
  std::string source = {};  ///< "command line: ..." or FILE:LINE
  std::string input = {};
};

struct Deletion {
  std::string key, value, source;
  bool has_value = false, used = false;
};

/// The choices made so far, by override key, for names like ${model}.
struct KnownChoices : Lookup {
  std::map<std::string, std::string> choices;
  Resolver nothing{make_node(Kind::mapping), false};

  NodePtr key(int dots, const std::vector<std::string>& path) override {
    std::string name = std::string(static_cast<size_t>(dots), '.') + join(path, ".");
    auto found = choices.find(name);
    if (found != choices.end()) return make_plain_text(found->second);
    std::vector<std::string> known;
    for (const auto& choice : choices) known.push_back(choice.first);
    throw UserError("${" + name + "} in a defaults list refers to the choice of a group" +
                    suggestion(name, known));
  }
  NodePtr resolver(const std::string&, const std::vector<NodePtr>&,
                   const std::vector<std::string>& texts) override {
    // Only the environment's resolvers make sense here; they need no tree.
    return nothing.dereference(make_text("${oc.env:" + join(texts, ",") + "}"));
  }
};

class Expansion {
 public:
  Expansion(Repository& repository, const std::vector<Override>& overrides)
      : repository_(repository) {
    for (const auto& override : overrides) {
      if (is_group_override(repository, override)) take(override);
    }
  }

  std::vector<DefaultsRow> run(const std::string& primary) {
    std::vector<std::unique_ptr<TreeNode>> roots;
    auto first = std::make_unique<TreeNode>();
    first->entry.name =
        primary.ends_with(".yaml") ? primary.substr(0, primary.size() - 5) : primary;
    first->parent = "<root>";
    roots.push_back(std::move(first));
    for (auto& entry : added_) {
      auto node = std::make_unique<TreeNode>();
      node->entry = entry;
      node->parent = "<root>";
      roots.push_back(std::move(node));
    }
    for (auto root = roots.rbegin(); root != roots.rend(); ++root) expand(**root, 0, false);
    while (!deferred_.empty()) {
      std::vector<std::pair<TreeNode*, int>> waiting;
      waiting.swap(deferred_);
      for (auto& [node, depth] : waiting) expand_deferred(*node, depth);
    }
    refuse_unused();
    std::vector<DefaultsRow> rows;
    for (const auto& root : roots) flatten(*root, rows);
    return rows;
  }

 private:
  void take(const Override& override) {
    std::string place = override.origin().describe() + ": ";
    std::string key = override.key + (override.has_package ? "@" + override.package : "");
    const Value& value = override.value;
    if (override.action == Override::Action::force_add) {
      throw UserError(place + "++ does not choose from a group; use " + override.input.substr(2) +
                      " or +" + override.input.substr(2));
    }
    if (override.action == Override::Action::remove) {
      bool no_value = !override.has_value || value.kind == Value::Kind::null;
      if (!no_value && value.kind != Value::Kind::text)
        throw UserError(place + "the choice to remove is a name");
      deletions_.push_back({key, value.text, place, !no_value, false});
      return;
    }
    GroupOverride chosen{.external = true, .source = place, .input = override.input};
    bool good = value.kind == Value::Kind::text || value.kind == Value::Kind::list;
    chosen.is_list = value.kind == Value::Kind::list;
    if (value.kind == Value::Kind::text) chosen.choices = {value.text};
    for (const auto& item : value.items) {
      good &= item.kind == Value::Kind::text;
      chosen.choices.push_back(item.text);
    }
    if (!good) {
      throw UserError(
          place + "the choice from the group " + override.key +
          " is a name or a list of names; known: " + join(repository_.choices(override.key), ", "));
    }
    if (override.action == Override::Action::change) {
      overrides_[key] = chosen;
      return;
    }
    DefaultsEntry entry{.kind = DefaultsEntry::Kind::group,
                        .name = override.key,
                        .choices = chosen.choices,
                        .is_list = chosen.is_list,
                        .origin = override.origin()};
    if (override.has_package) entry.package = override.package;
    added_.push_back(entry);
  }

  /// Fills node.files; children in reverse, so that the overrides of a later file reach earlier
  /// groups.
  void expand(TreeNode& node, int depth, bool interpolated) {
    if (depth > kMaximumDepth) fail(node, "the defaults lists include each other without end");
    DefaultsEntry& entry = node.entry;
    if (entry.kind == DefaultsEntry::Kind::group) {
      known_groups_.push_back(node.override_key());
      apply_group_override(node);
      if (node.skipped || entry.is_null) return;
      if (entry.is_missing) {
        fail(node, "the group " + entry.name + " has no choice yet; give one: " +
                       node.override_key() + "=" + join(repository_.choices(node.path()), "|"));
      }
      bool waits = std::any_of(entry.choices.begin(), entry.choices.end(), is_interpolated);
      if (!waits && !entry.is_list) known_.choices[node.override_key()] = entry.choices[0];
      if (waits) node.deferred = true;
    } else {
      node.deferred = is_interpolated(entry.name);
    }
    if (node.deferred) {
      deferred_.emplace_back(&node, depth);
      return;
    }
    load_files(node, depth, interpolated);
  }

  void expand_deferred(TreeNode& node, int depth) {
    auto resolve = [&](const std::string& text) {
      if (!is_interpolated(text)) return text;
      try {
        return python_text(*evaluate_text(text, known_));
      } catch (const UserError& error) {
        fail(node, error.what());
      }
    };
    if (node.entry.kind == DefaultsEntry::Kind::config) node.entry.name = resolve(node.entry.name);
    for (auto& choice : node.entry.choices) choice = resolve(choice);
    load_files(node, depth, true);
  }

  void apply_group_override(TreeNode& node) {
    std::string key = node.override_key();
    DefaultsEntry& entry = node.entry;
    auto found = overrides_.find(key);
    if (found != overrides_.end()) {
      GroupOverride& override = found->second;
      override.used = true;
      entry.choices = override.choices;
      entry.is_list = override.is_list;
      entry.is_null = override.is_null;
      entry.is_missing = false;
    }
    for (auto& deletion : deletions_) {
      if (deletion.key != key || entry.is_list) continue;
      if (deletion.has_value && (entry.choices.empty() || entry.choices[0] != deletion.value))
        continue;
      deletion.used = true;
      node.skipped = true;
    }
  }

  void load_files(TreeNode& node, int depth, bool interpolated) {
    DefaultsEntry& entry = node.entry;
    std::vector<std::string> paths;
    if (entry.kind == DefaultsEntry::Kind::group) {
      for (const auto& choice : entry.choices) paths.push_back(node.path() + "/" + choice);
    } else {
      paths.push_back(node.path());
    }
    for (auto& path : paths) {
      const ConfigFile* file = repository_.load(path);
      if (!file && entry.optional) continue;
      if (!file) missing_file(node, path);
      if (++nodes_ > kMaximumNodes) fail(node, "the defaults lists name more than 10000 files");
      if (path.ends_with(".yaml")) path.resize(path.size() - 5);
      TreeNode::File loaded{.config = path, .package = "", .file = file, .children = {}};
      bool by_header = !entry.package && file->package;
      bool primary = node.parent == "<root>" && entry.kind == DefaultsEntry::Kind::config;
      loaded.package = by_header ? header_package(*file->package)
                       : primary ? dotted(directory_of(path))
                                 : node.package();
      node.files.push_back(std::move(loaded));
    }
    // In reverse as well: the overrides of a later choice come first.
    for (auto file = node.files.rbegin(); file != node.files.rend(); ++file) {
      expand_children(node, *file, depth, interpolated);
    }
  }

  void expand_children(const TreeNode& node, TreeNode::File& file, int depth, bool interpolated) {
    std::vector<std::string> keys;
    for (const auto& entry : file.file->defaults) {
      auto child = std::make_unique<TreeNode>();
      child->entry = entry;
      child->base = node.group();
      child->parent_package = file.package;
      child->parent = file.config;
      if (entry.override) {
        if (interpolated) {
          fail(*child,
               "override is not allowed in a file that an interpolation chose; give it on the "
               "command line: " +
                   child->override_key() + "=" + join(entry.choices, ","));
        }
        GroupOverride override{.choices = entry.choices,
                               .is_list = entry.is_list,
                               .is_null = entry.is_null,
                               .external = false,
                               .source = entry.origin.describe() + ": ",
                               .input = ""};
        overrides_.try_emplace(child->override_key(),
                               override);  // the first, from nearer the root, wins
        continue;
      }
      if (entry.kind == DefaultsEntry::Kind::group) {
        std::string key = child->override_key();
        if (std::find(keys.begin(), keys.end(), key) != keys.end()) {
          fail(*child,
               "the group " + key +
                   " stands twice in this list; to replace a choice made elsewhere: - override " +
                   key + ": " + join(entry.choices, ","));
        }
        keys.push_back(key);
      }
      file.children.push_back(std::move(child));
    }
    for (auto child = file.children.rbegin(); child != file.children.rend(); ++child) {
      if ((*child)->entry.kind != DefaultsEntry::Kind::self)
        expand(**child, depth + 1, interpolated);
    }
  }

  void flatten(const TreeNode& node, std::vector<DefaultsRow>& rows) {
    if (node.entry.kind == DefaultsEntry::Kind::group && !node.files.empty() &&
        !final_keys_.insert(node.override_key()).second) {
      fail(node, "the group " + node.override_key() +
                     " appears more than once in the final defaults list; to replace the "
                     "first choice: " +
                     node.override_key() + "=" + join(node.entry.choices, ","));
    }
    for (const auto& file : node.files) {
      DefaultsRow self{file.config, file.package, node.parent, !file.children.empty(), file.file};
      if (file.children.empty()) rows.push_back(self);
      for (const auto& child : file.children) {
        if (child->entry.kind == DefaultsEntry::Kind::self) {
          rows.push_back(self);
        } else {
          flatten(*child, rows);
        }
      }
    }
  }

  void refuse_unused() const {
    for (const auto& [key, override] : overrides_) {
      if (override.used) continue;
      throw UserError(override.source + "no group " + key + " stands in the defaults list" +
                      suggestion(key, known_groups_) +
                      (override.external ? "; to add it: +" + override.input : ""));
    }
    for (const auto& deletion : deletions_) {
      if (deletion.used) continue;
      throw UserError(deletion.source + "no group " + deletion.key +
                      (deletion.has_value ? "=" + deletion.value : "") +
                      " stands in the defaults list" + suggestion(deletion.key, known_groups_));
    }
  }

  [[noreturn]] void missing_file(const TreeNode& node, const std::string& path) {
    if (node.parent == "<root>" && node.entry.kind == DefaultsEntry::Kind::config) {
      throw UserError(repository_.directory().string() + ": there is no configuration " + path +
                      suggestion(path, repository_.choices("")));
    }
    std::string name =
        path.substr(node.group().empty() ? 0 : std::min(path.size(), node.group().size() + 1));
    auto override = overrides_.find(node.override_key());
    bool by_override =
        node.entry.kind == DefaultsEntry::Kind::group && override != overrides_.end();
    std::string message = "there is no " + path + ".yaml in " + repository_.directory().string() +
                          suggestion(name, repository_.choices(node.group()));
    if (by_override) throw UserError(override->second.source + message);
    fail(node, message);
  }

  [[noreturn]] static void fail(const TreeNode& node, const std::string& message) {
    std::string place = node.entry.origin.describe();
    throw UserError((place.empty() ? "" : place + ": ") + message);
  }

  Repository& repository_;
  std::map<std::string, GroupOverride> overrides_;
  std::vector<Deletion> deletions_;
  std::vector<DefaultsEntry> added_;
  std::vector<std::pair<TreeNode*, int>> deferred_;
  KnownChoices known_;
  std::vector<std::string> known_groups_;
  std::set<std::string> final_keys_;
  size_t nodes_ = 0;
};

}  // namespace

bool is_group_override(const Repository& repository, const Override& override) {
  bool exists = repository.has_group(override.key);
  if (override.has_package && !exists) {
    throw UserError(override.origin().describe() + ": there is no group " + override.key +
                    suggestion(override.key, repository.groups()));
  }
  return exists && override.value.kind != Value::Kind::mapping;
}

std::vector<DefaultsRow> expand_defaults(Repository& repository, const std::string& primary,
                                         const std::vector<Override>& overrides) {
  return Expansion(repository, overrides).run(primary);
}

}  // namespace espalier::config
