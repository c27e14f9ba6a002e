#include "pipeline/config/section.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "pipeline/config/nearest.h"
#include "pipeline/config/node.h"
#include "pipeline/config/print.h"
#include "pipeline/errors.h"

namespace espalier::config {

/// What was read of one mapping so far; children share theirs, so that finish() covers them.
struct Section::State {
  std::shared_ptr<const Node> node;
  std::string path;
  std::set<std::string> known;
  std::map<std::string, Section>
      children;  ///< by key, "key.name" for children(), "key.0" for items()

  std::string full(const std::string& key) const { return path.empty() ? key : path + "." + key; }

  NodePtr look(const std::string& key) {
    known.insert(key);
    return node->find(key);
  }

  [[noreturn]] void refuse(const Node* value, const std::string& key,
                           const std::string& message) const {
    std::string place = value ? value->origin.describe() : node->origin.describe();
    throw UserError((place.empty() ? "" : place + ": ") + full(key) + ": " + message);
  }

  NodePtr require(const std::string& key, const std::string& expected) {
    NodePtr value = look(key);
    if (!value) refuse(nullptr, key, "the key is missing; expected " + expected);
    if (value->kind == Kind::missing) {
      std::string cause = value->text == "???" || value->text.empty() ? full(key) : value->text;
      refuse(value.get(), key,
             "mandatory and not set (\?\?\?); expected " + expected + ", for example " + cause +
                 "=VALUE on the command line");
    }
    if (value->kind == Kind::null) refuse(value.get(), key, "null; expected " + expected);
    return value;
  }

  [[noreturn]] void wrong_type(const Node& value, const std::string& key,
                               const std::string& expected) const {
    std::string hint;
    if (expected == "a text" && value.kind == Kind::integer) {
      hint =
          "; a plain 2:4 in a file is an integer in base 60, so texts that look like numbers are "
          "quoted: \"2:4\"";
    } else if (expected == "a text" && !value.is_container()) {
      hint = "; quote it if it is a text";
    }
    refuse(&value, key,
           describe_value(value) + " is no " + expected.substr(expected.find(' ') + 1) +
               "; expected " + expected + hint);
  }

  Section child_of(const std::string& name, const NodePtr& value,
                   const std::string& path_of_child) {
    auto found = children.find(name);
    if (found == children.end())
      found = children.emplace(name, Section(value, path_of_child)).first;
    return found->second;
  }
};

namespace {

std::string bound_text(double bound) {
  if (bound == std::floor(bound) && std::abs(bound) < 1e15)
    return std::to_string(static_cast<int64_t>(bound));
  return python_float(bound);
}

std::string range_text(const Range& range) {
  std::string low =
      std::isinf(range.low) ? "(-inf" : (range.low_open ? "(" : "[") + bound_text(range.low);
  std::string high =
      std::isinf(range.high) ? "inf)" : bound_text(range.high) + (range.high_open ? ")" : "]");
  return low + ", " + high;
}

bool inside(double value, const Range& range) {
  bool above = range.low_open ? value > range.low : value >= range.low;
  bool below = range.high_open ? value < range.high : value <= range.high;
  return above && below;  // false for NaN
}

bool is_absent(const NodePtr& value) { return !value || value->kind == Kind::null; }

}  // namespace

Section::Section(std::shared_ptr<const Node> node, std::string path)
    : state_(std::make_shared<State>()) {
  state_->node = std::move(node);
  state_->path = std::move(path);
}

const std::string& Section::path() const { return state_->path; }

bool Section::has(const std::string& key) const { return state_->look(key) != nullptr; }

bool Section::is_null(const std::string& key) const { return is_absent(state_->look(key)); }

std::string Section::text(const std::string& key) const {
  NodePtr value = state_->require(key, "a text");
  if (value->kind != Kind::text) state_->wrong_type(*value, key, "a text");
  return value->text;
}

bool Section::flag(const std::string& key) const {
  NodePtr value = state_->require(key, "true or false");
  if (value->kind != Kind::boolean) {
    state_->refuse(value.get(), key, describe_value(*value) + " is neither true nor false");
  }
  return value->boolean;
}

int64_t Section::integer(const std::string& key, Range range) const {
  NodePtr value = state_->require(key, "an integer in " + range_text(range));
  if (value->kind != Kind::integer) state_->wrong_type(*value, key, "an integer");
  if (!inside(static_cast<double>(value->integer), range)) {
    state_->refuse(value.get(), key,
                   std::to_string(value->integer) + " is outside " + range_text(range));
  }
  return value->integer;
}

double Section::number(const std::string& key, Range range) const {
  NodePtr value = state_->require(key, "a number in " + range_text(range));
  if (value->kind != Kind::integer && value->kind != Kind::real)
    state_->wrong_type(*value, key, "a number");
  double number = value->kind == Kind::integer ? static_cast<double>(value->integer) : value->real;
  if (!inside(number, range))
    state_->refuse(value.get(), key, describe_value(*value) + " is outside " + range_text(range));
  return number;
}

std::string Section::choice(const std::string& key, const std::vector<std::string>& legal) const {
  NodePtr value = state_->require(key, "one of " + join(legal, ", "));
  if (value->kind == Kind::text &&
      std::find(legal.begin(), legal.end(), value->text) != legal.end())
    return value->text;
  std::string near = nearest(value->text, legal);
  state_->refuse(value.get(), key,
                 describe_value(*value) + " is not one of " + join(legal, ", ") +
                     (near.empty() ? "" : "; did you mean " + near + "?"));
}

std::vector<std::string> Section::texts(const std::string& key) const {
  NodePtr value = state_->require(key, "a list of texts");
  if (value->kind != Kind::list) state_->wrong_type(*value, key, "a list of texts");
  std::vector<std::string> result;
  for (const auto& item : value->items) {
    if (item->kind != Kind::text) state_->wrong_type(*item, key, "a text");
    result.push_back(item->text);
  }
  return result;
}

std::vector<double> Section::numbers(const std::string& key, Range range) const {
  NodePtr value = state_->require(key, "a list of numbers in " + range_text(range));
  if (value->kind != Kind::list) state_->wrong_type(*value, key, "a list of numbers");
  std::vector<double> result;
  for (const auto& item : value->items) {
    if (item->kind != Kind::integer && item->kind != Kind::real)
      state_->wrong_type(*item, key, "a number");
    result.push_back(item->kind == Kind::integer ? static_cast<double>(item->integer) : item->real);
    if (!inside(result.back(), range))
      state_->refuse(item.get(), key, describe_value(*item) + " is outside " + range_text(range));
  }
  return result;
}

std::optional<std::string> Section::optional_text(const std::string& key) const {
  return is_null(key) ? std::nullopt : std::optional(text(key));
}
std::optional<int64_t> Section::optional_integer(const std::string& key, Range range) const {
  return is_null(key) ? std::nullopt : std::optional(integer(key, range));
}
std::optional<double> Section::optional_number(const std::string& key, Range range) const {
  return is_null(key) ? std::nullopt : std::optional(number(key, range));
}
bool Section::flag_or(const std::string& key, bool otherwise) const {
  return is_null(key) ? otherwise : flag(key);
}
int64_t Section::integer_or(const std::string& key, int64_t otherwise, Range range) const {
  return is_null(key) ? otherwise : integer(key, range);
}
double Section::number_or(const std::string& key, double otherwise, Range range) const {
  return is_null(key) ? otherwise : number(key, range);
}
std::string Section::text_or(const std::string& key, const std::string& otherwise) const {
  return is_null(key) ? otherwise : text(key);
}

Section Section::child(const std::string& key) const {
  NodePtr value = state_->require(key, "a mapping");
  if (value->kind != Kind::mapping) state_->wrong_type(*value, key, "a mapping");
  return state_->child_of(key, value, state_->full(key));
}

std::vector<std::pair<std::string, Section>> Section::children(const std::string& key) const {
  NodePtr value = state_->require(key, "a mapping of mappings");
  if (value->kind != Kind::mapping) state_->wrong_type(*value, key, "a mapping of mappings");
  std::vector<std::pair<std::string, Section>> result;
  for (const auto& [name, member] : value->entries) {
    std::string path = key + "." + name.text;
    if (member->kind == Kind::null) continue;  // a task switched off: text: null
    if (member->kind != Kind::mapping) state_->wrong_type(*member, path, "a mapping");
    result.emplace_back(name.text, state_->child_of(path, member, state_->full(path)));
  }
  return result;
}

std::vector<Section> Section::items(const std::string& key) const {
  std::vector<Section> result;
  NodePtr value = state_->look(key);
  if (is_absent(value)) return result;
  if (value->kind != Kind::list) state_->wrong_type(*value, key, "a list of mappings");
  for (size_t i = 0; i < value->items.size(); ++i) {
    std::string path = key + "." + std::to_string(i);
    if (value->items[i]->kind != Kind::mapping)
      state_->wrong_type(*value->items[i], path, "a mapping");
    result.push_back(state_->child_of(path, value->items[i], state_->full(path)));
  }
  return result;
}

void Section::allow(const std::vector<std::string>& keys) const {
  state_->known.insert(keys.begin(), keys.end());
}

void Section::finish() const {
  std::vector<std::string> known(state_->known.begin(), state_->known.end());
  for (const auto& [key, value] : state_->node->entries) {
    if (state_->known.contains(key.text)) continue;
    std::string near = nearest(key.text, known);
    state_->refuse(value.get(), key.text,
                   "unknown key" + (near.empty() ? suggestion(key.text, known)
                                                 : "; did you mean " + state_->full(near) + "?"));
  }
  for (const auto& [name, section] : state_->children) section.finish();
}

void Section::fail(const std::string& key, const std::string& message) const {
  NodePtr value = state_->look(key);
  state_->refuse(value.get(), key, message);
}

std::string Section::canonical() const { return to_json(*state_->node, true); }

}  // namespace espalier::config
