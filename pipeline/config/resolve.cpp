#include "pipeline/config/resolve.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "pipeline/config/nearest.h"
#include "pipeline/config/scalars.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr size_t kMaximumChain = 64;
constexpr size_t kMaximumValues = 200000;
constexpr size_t kMaximumBytes = 16 << 20;

const std::vector<std::string> kResolvers = {"oc.env",        "oc.decode",     "oc.select",
                                             "oc.create",     "oc.deprecated", "oc.dict.keys",
                                             "oc.dict.values"};

std::string dotted(int dots, const std::vector<std::string>& path) {
  return std::string(static_cast<size_t>(dots), '.') + join(path, ".");
}

/// Thrown when an interpolation meets `???` and missing values are kept.
struct MeetsMissing {
  std::string path;
};

struct Restore {
  std::vector<NodePtr>& stack;
  ~Restore() { stack.pop_back(); }
};

}  // namespace

std::vector<std::string> split_path(const std::string& path) {
  std::vector<std::string> parts(1);
  for (char c : path) {
    if (c == '.' || c == '[') {
      if (c == '[' && parts.back().empty() && parts.size() == 1) continue;
      parts.emplace_back();
    } else if (c != ']') {
      parts.back() += c;
    }
  }
  return parts;
}

Resolver::Resolver(NodePtr root, bool keep_missing)
    : root_(std::move(root)), keep_missing_(keep_missing) {
  adopt(root_, nullptr);
}

void Resolver::adopt(const NodePtr& node, Node* parent) {
  parents_[node.get()] = parent;
  for (const auto& item : node->items) adopt(item, node.get());
  for (const auto& entry : node->entries) adopt(entry.second, node.get());
}

void Resolver::fail(const std::string& message) const {
  std::string place = evaluating_.empty() ? "" : evaluating_.back()->origin.describe() + ": ";
  std::string text = evaluating_.empty() ? "" : evaluating_.back()->text + ": ";
  throw UserError((place == ": " ? "" : place) + text + message);
}

void Resolver::spend(size_t values, size_t bytes) {
  spent_values_ += values;
  spent_bytes_ += bytes;
  if (spent_values_ > kMaximumValues || spent_bytes_ > kMaximumBytes) {
    fail("the interpolations expand to more than 200000 values or 16 MiB");
  }
}

NodePtr Resolver::dereference(const NodePtr& node) {
  if (node->kind != Kind::interpolation) return node;
  if (auto found = values_.find(node.get()); found != values_.end()) return found->second;
  if (std::find(evaluating_.begin(), evaluating_.end(), node) != evaluating_.end()) {
    fail("the interpolation refers to itself");
  }
  if (evaluating_.size() >= kMaximumChain)
    fail("more than 64 interpolations refer to each other in a row");
  evaluating_.push_back(node);
  Restore restore{evaluating_};
  NodePtr value;
  try {
    value = evaluate_text(node->text, *this);
  } catch (const MeetsMissing& missing) {
    if (evaluating_.size() > 1) throw;
    value = make_node(Kind::missing, node->origin);
    value->text = missing.path;
  }
  spend(1, value->text.size());
  if (!parents_.contains(value.get())) {  // made here, not a node of the tree
    if (value->is_container()) value = copy(*value);
    kept_.push_back(value);
    place_all(*value, node->origin);
    adopt(value, parents_[node.get()]);
  }
  return values_[node.get()] = value;
}

NodePtr Resolver::resolved(const NodePtr& node) {
  NodePtr value = dereference(node);
  if (!open_containers_.insert(value.get()).second)
    fail("a container contains itself through an interpolation");
  if (open_containers_.size() > 200) fail("nested deeper than 200 levels");
  auto result = std::make_shared<Node>(*value);
  if (node->kind == Kind::interpolation) result->origin = node->origin;
  spend(1, value->text.size());
  for (auto& item : result->items) item = resolved(item);
  for (auto& entry : result->entries) entry.second = resolved(entry.second);
  open_containers_.erase(value.get());
  return result;
}

NodePtr Resolver::start_of(int dots) const {
  if (dots == 0) return root_;
  Node* start = parents_.at(evaluating_.back().get());
  for (int i = 1; i < dots && start; ++i) start = parents_.at(start);
  if (!start) return nullptr;
  if (start == root_.get()) return root_;
  return NodePtr(NodePtr{}, start);  // owned by the tree
}

/// The node at the path, interpolations on the way dereferenced; nullptr and why when there is
/// none.
NodePtr Resolver::walk(int dots, const std::vector<std::string>& path, std::string& problem) {
  NodePtr node = start_of(dots);
  if (!node) {
    problem = dotted(dots, path) + " goes above the root";
    return nullptr;
  }
  std::string passed;
  for (const auto& part : path) {
    node = dereference(node);
    if (node->kind == Kind::missing) {
      problem = "";
      return node;
    }
    NodePtr next;
    std::vector<std::string> known;
    if (node->kind == Kind::mapping) {
      next = node->find(part);
      for (const auto& entry : node->entries) known.push_back(passed + entry.first.text);
    } else if (node->kind == Kind::list) {
      size_t index = 0;
      auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), index);
      if (error == std::errc{} && end == part.data() + part.size() && index < node->items.size()) {
        next = node->items[index];
      }
    }
    if (!next) {
      problem = "there is no " + passed + part + suggestion(passed + part, known);
      return nullptr;
    }
    node = next;
    passed += part + ".";
  }
  return dereference(node);
}

NodePtr Resolver::select(const std::vector<std::string>& path) {
  std::string problem;
  return walk(0, path, problem);
}

NodePtr Resolver::key(int dots, const std::vector<std::string>& path) {
  std::string problem;
  NodePtr node = walk(dots, path, problem);
  if (!node) fail(problem);
  if (node->kind == Kind::missing) {
    if (keep_missing_) throw MeetsMissing{dotted(dots, path)};
    fail("it refers to " + dotted(dots, path) +
         ", which is mandatory (\?\?\?) and not set; set it, for example " + join(path, ".") +
         "=VALUE on the command line");
  }
  return node;
}

NodePtr Resolver::select_text(const std::string& text) {
  size_t dots = text.find_first_not_of('.');
  if (dots == std::string::npos) dots = text.size();
  std::string problem;
  return walk(static_cast<int>(dots), split_path(text.substr(dots)), problem);
}

NodePtr Resolver::oc_select(const std::vector<NodePtr>& arguments) {
  if (arguments.empty() || arguments.size() > 2)
    fail("oc.select takes a key and an optional default");
  NodePtr node = select_text(python_text(*arguments[0]));
  if (node && node->kind != Kind::missing) return node;
  return arguments.size() == 2 ? arguments[1] : make_node(Kind::null);
}

NodePtr Resolver::oc_dict(const std::string& name, const std::vector<NodePtr>& arguments) {
  if (arguments.size() != 1 || arguments[0]->kind != Kind::text)
    fail(name + " takes the key of a mapping");
  NodePtr node = select_text(arguments[0]->text);
  if (!node || node->kind != Kind::mapping)
    fail(name + ": " + arguments[0]->text + " is not a mapping");
  NodePtr list = make_node(Kind::list);
  for (const auto& [key, value] : node->entries) {
    list->items.push_back(name == "oc.dict.keys" ? make_plain_text(key.text) : resolved(value));
  }
  return list;
}

NodePtr Resolver::oc_env(const std::vector<NodePtr>& arguments) {
  if (arguments.empty() || arguments.size() > 2)
    fail("oc.env takes a name and an optional default");
  std::string name = python_text(*arguments[0]);
  if (const char* value = std::getenv(name.c_str())) return make_plain_text(value);
  if (arguments.size() == 1) {
    fail("the environment variable " + name +
         " is not set; set it or give a default: ${oc.env:" + name + ",DEFAULT}");
  }
  return arguments[1]->kind == Kind::null ? arguments[1]
                                          : make_plain_text(python_text(*arguments[1]));
}

NodePtr Resolver::resolver(const std::string& name, const std::vector<NodePtr>& arguments,
                           const std::vector<std::string>& texts) {
  if (name == "oc.env") return oc_env(arguments);
  if (name == "oc.select") return oc_select(arguments);
  if (name == "oc.dict.keys" || name == "oc.dict.values") return oc_dict(name, arguments);
  if (name == "oc.decode") {
    if (arguments.size() != 1) fail("oc.decode takes one text");
    if (arguments[0]->kind == Kind::null) return arguments[0];
    if (arguments[0]->kind != Kind::text)
      fail("oc.decode takes a text, found " + describe_value(*arguments[0]));
    return evaluate_element(arguments[0]->text, *this);
  }
  if (name == "oc.create") {
    if (arguments.size() != 1 ||
        (!arguments[0]->is_container() && arguments[0]->kind != Kind::null)) {
      fail("oc.create takes a list or a mapping");
    }
    return arguments[0]->kind == Kind::null ? arguments[0] : copy(*arguments[0]);
  }
  if (name == "oc.deprecated") {
    if (arguments.empty() || arguments.size() > 2 || texts[0].empty())
      fail("oc.deprecated takes a key");
    NodePtr node = select_text(python_text(*arguments[0]));
    if (!node) fail("oc.deprecated: there is no " + texts[0]);
    return node;
  }
  if (name == "hydra" || name == "now") {
    fail("the resolver " + name +
         ": is Hydra's own and not here; a run's values must be the same when it is "
         "started again");
  }
  fail("unknown resolver " + name + suggestion(name, kResolvers));
}

}  // namespace espalier::config
