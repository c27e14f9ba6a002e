#include "pipeline/config/merge.h"

#include <charconv>

#include "pipeline/config/nearest.h"
#include "pipeline/config/resolve.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

[[noreturn]] void kinds_differ(const Node& target, const Node& source, const std::string& path) {
  throw UserError(source.origin.describe() + ": " + path + ": a " + kind_name(source.kind) +
                  " cannot be merged with the " + kind_name(target.kind) + " of " +
                  target.origin.describe() + "; remove the old one first: ~" + path);
}

/// What `${...}` stands for now, when it is a container; nullptr otherwise.
NodePtr container_behind(const NodePtr& root, const NodePtr& node) {
  try {
    NodePtr value = Resolver(root, false).dereference(node);
    return value->is_container() ? value : nullptr;
  } catch (const UserError&) {
    return nullptr;
  }
}

struct Merger {
  NodePtr root;             ///< interpolations of the target are looked up here
  bool only_known = false;  ///< OmegaConf's struct mode: a key that is not there is refused
  std::string hint;

  void mappings(const NodePtr& target, const Node& source, const std::string& path) {
    for (const auto& [key, value] : source.entries) {
      std::string name = path.empty() ? key.text : path + "." + key.text;
      NodePtr old = target->find(key);
      if (!old) {
        if (only_known) {
          std::vector<std::string> known;
          for (const auto& entry : target->entries) known.push_back(entry.first.text);
          throw UserError(value->origin.describe() + ": there is no key " + name +
                          suggestion(key.text, known) + hint);
        }
        target->set(key, copy(*value));
        continue;
      }
      if (value->kind == Kind::missing) continue;
      target->set(key, merged(old, *value, name));
    }
  }

  NodePtr merged(NodePtr old, const Node& value, const std::string& path) {
    if (old->kind == Kind::interpolation && value.is_container() && !only_known) {
      if (NodePtr behind = container_behind(root, old)) old = copy(*behind);
    }
    if (!old->is_container() || !value.is_container()) return copy(value);
    if (old->kind != value.kind) kinds_differ(*old, value, path);
    if (old->kind == Kind::list) return copy(value);
    mappings(old, value, path);
    return old;
  }
};

std::vector<std::string> override_path(const std::string& key) {
  std::vector<std::string> parts(1);
  for (char c : key) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

NodePtr* list_item(Node& list, const std::string& index) {
  size_t at = 0;
  auto [end, error] = std::from_chars(index.data(), index.data() + index.size(), at);
  bool good = error == std::errc{} && end == index.data() + index.size() && at < list.items.size();
  return good ? &list.items[at] : nullptr;
}

[[noreturn]] void no_such_key(const Override& override, const Node& root) {
  throw UserError(override.origin().describe() + ": there is no key " + override.key +
                  suggestion(override.key, all_paths(root)) + "; to add a new one: +" +
                  override.input);
}

[[noreturn]] void no_such_item(const Override& override, const std::string& part) {
  throw UserError(override.origin().describe() + ": \"" + part + "\" is no index of that list");
}

NodePtr select_or_null(const NodePtr& root, const std::string& key) {
  try {
    return Resolver(root, false).select(override_path(key));
  } catch (const UserError&) {
    return nullptr;
  }
}

/// Sets one key; `adding` creates it and the mappings on its way.
void update(const NodePtr& root, const Override& override, const NodePtr& value, bool adding) {
  std::vector<std::string> path = override_path(override.key);
  NodePtr node = root;
  for (size_t i = 0; i + 1 < path.size(); ++i) {
    NodePtr next;
    if (node->kind == Kind::list) {
      NodePtr* item = list_item(*node, path[i]);
      if (!item) no_such_item(override, path[i]);
      if (!(*item)->is_container()) {
        if (!adding) no_such_key(override, *root);
        *item = make_node(Kind::mapping, override.origin());
      }
      next = *item;
    } else {
      next = node->find(path[i]);
      if (!next || !next->is_container()) {
        if (!adding) no_such_key(override, *root);
        next = make_node(Kind::mapping, override.origin());
        node->set(Key{path[i]}, next);
      }
    }
    node = next;
  }
  Merger merger{
      .root = root, .only_known = !adding, .hint = "; to add new keys: +" + override.input};
  const std::string& last = path.back();
  if (node->kind == Kind::list) {
    NodePtr* item = list_item(*node, last);
    if (!item) no_such_item(override, last);
    *item = (*item)->kind == Kind::interpolation ? copy(*value)
                                                 : merger.merged(*item, *value, override.key);
    return;
  }
  NodePtr old = node->find(last);
  if (!old && !adding) no_such_key(override, *root);
  bool replace = !old || old->kind == Kind::interpolation;
  node->set(Key{last}, replace ? copy(*value) : merger.merged(old, *value, override.key));
}

void remove(const NodePtr& root, const Override& override, const NodePtr& value) {
  std::string place = override.origin().describe() + ": ";
  NodePtr found = override.key.empty() ? nullptr : select_or_null(root, override.key);
  if (!found || found->kind == Kind::null || found->kind == Kind::missing) {
    throw UserError(place + "there is no value at " + override.key + " to remove" +
                    suggestion(override.key, all_paths(*root)));
  }
  if (value->kind != Kind::null && !equal_values(*found, *value)) {
    throw UserError(place + "the value of " + override.key + " is " + describe_value(*found) +
                    ", not " + describe_value(*value));
  }
  size_t dot = override.key.rfind('.');
  NodePtr parent =
      dot == std::string::npos ? root : select_or_null(root, override.key.substr(0, dot));
  std::string last = dot == std::string::npos ? override.key : override.key.substr(dot + 1);
  if (!parent || parent->kind != Kind::mapping)
    throw UserError(place + "an item of a list cannot be removed; give the whole list");
  parent->erase(Key{last});
}

void collect(const Node& node, const std::string& path, std::vector<std::string>& paths) {
  for (const auto& [key, value] : node.entries) {
    std::string name = path.empty() ? key.text : path + "." + key.text;
    paths.push_back(name);
    collect(*value, name, paths);
  }
}

}  // namespace

std::vector<std::string> all_paths(const Node& root) {
  std::vector<std::string> paths;
  collect(root, "", paths);
  return paths;
}

void merge(const NodePtr& target, const Node& source) {
  Merger{.root = target, .only_known = false, .hint = ""}.mappings(target, source, "");
}

void merge_package(const NodePtr& root, const NodePtr& content, const std::string& package) {
  NodePtr wrapped = content;
  std::vector<std::string> parts =
      package.empty() ? std::vector<std::string>{} : override_path(package);
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    NodePtr outer = make_node(Kind::mapping, content->origin);
    outer->set(Key{*part}, wrapped);
    wrapped = outer;
  }
  if (wrapped->kind != Kind::mapping) {
    throw UserError(wrapped->origin.describe() +
                    ": a configuration without a package is a mapping, found a list");
  }
  merge(root, *wrapped);
}

namespace {

void check_interpolations(const Node& node) {
  if (node.kind == Kind::interpolation) check_interpolation(node.text);
  for (const auto& item : node.items) check_interpolations(*item);
  for (const auto& entry : node.entries) check_interpolations(*entry.second);
}

}  // namespace

void apply_override(const NodePtr& root, const Override& override) {
  std::string place = override.origin().describe() + ": ";
  NodePtr value;
  try {
    value = override.value.node();
    check_interpolations(*value);
  } catch (const UserError& error) {
    throw UserError(place + error.what());
  }
  place_all(*value, override.origin());
  if (override.action == Override::Action::remove) {
    remove(root, override, value);
    return;
  }
  if (override.action == Override::Action::add && !value->is_container()) {
    NodePtr old = select_or_null(root, override.key);
    if (old && old->kind != Kind::null && old->kind != Kind::missing) {
      throw UserError(place + "there is already a value at " + override.key +
                      "; to change it: " + override.input.substr(1));
    }
  }
  update(root, override, value, override.action != Override::Action::change);
}

}  // namespace espalier::config
