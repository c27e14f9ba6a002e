#include "pipeline/config/node.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace espalier::config {

std::string Origin::describe() const {
  if (!place) return "";
  return line > 0 ? *place + ":" + std::to_string(line) : *place;
}

NodePtr Node::find(const Key& key) const {
  for (const auto& [name, value] : entries) {
    if (name == key) return value;
  }
  return nullptr;
}

void Node::set(const Key& key, NodePtr value) {
  for (auto& [name, old] : entries) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  entries.emplace_back(key, std::move(value));
}

void Node::erase(const Key& key) {
  std::erase_if(entries, [&](const auto& entry) { return entry.first == key; });
}

NodePtr make_node(Kind kind, Origin origin) {
  auto node = std::make_shared<Node>();
  node->kind = kind;
  node->origin = std::move(origin);
  return node;
}

NodePtr make_boolean(bool value) {
  auto node = make_node(Kind::boolean);
  node->boolean = value;
  return node;
}

NodePtr make_integer(int64_t value) {
  auto node = make_node(Kind::integer);
  node->integer = value;
  return node;
}

NodePtr make_real(double value) {
  auto node = make_node(Kind::real);
  node->real = value;
  return node;
}

NodePtr make_plain_text(const std::string& text) {
  auto node = make_node(Kind::text);
  node->text = text;
  return node;
}

NodePtr make_text(const std::string& text) {
  auto node = make_plain_text(text);
  if (text == "???") {
    node->kind = Kind::missing;
  } else if (text.find("${") != std::string::npos) {
    node->kind = Kind::interpolation;
  }
  return node;
}

NodePtr copy(const Node& node) {
  auto result = std::make_shared<Node>(node);
  for (auto& item : result->items) item = copy(*item);
  for (auto& entry : result->entries) entry.second = copy(*entry.second);
  return result;
}

void place_all(Node& node, const Origin& origin) {
  node.origin = origin;
  for (auto& item : node.items) place_all(*item, origin);
  for (auto& entry : node.entries) place_all(*entry.second, origin);
}

namespace {

bool is_number(const Node& node) {
  return node.kind == Kind::boolean || node.kind == Kind::integer || node.kind == Kind::real;
}

double as_double(const Node& node) {
  if (node.kind == Kind::boolean) return node.boolean ? 1.0 : 0.0;
  return node.kind == Kind::integer ? static_cast<double>(node.integer) : node.real;
}

}  // namespace

bool equal_values(const Node& a, const Node& b) {
  if (is_number(a) && is_number(b)) {
    if (a.kind == Kind::integer && b.kind == Kind::integer) return a.integer == b.integer;
    return as_double(a) == as_double(b);
  }
  if (a.kind != b.kind) return false;
  switch (a.kind) {
    case Kind::list:
      return std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(),
                        [](const NodePtr& x, const NodePtr& y) { return equal_values(*x, *y); });
    case Kind::mapping:
      return a.entries.size() == b.entries.size() &&
             std::all_of(a.entries.begin(), a.entries.end(), [&](const auto& entry) {
               NodePtr other = b.find(entry.first);
               return other && equal_values(*entry.second, *other);
             });
    case Kind::text:
    case Kind::interpolation:
      return a.text == b.text;
    default:
      return true;
  }
}

std::string python_float(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  if (value == 0) return std::signbit(value) ? "-0.0" : "0.0";
  char buffer[64];
  auto scientific =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  std::string text(buffer, scientific.ptr);
  int exponent = std::atoi(text.substr(text.find('e') + 1).c_str());
  if (exponent < -4 || exponent >= 16) return text;  // to_chars writes e-05 and e+16 as Python does
  auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed);
  text.assign(buffer, fixed.ptr);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

namespace {

std::string python_repr(const Node& node) {
  if (node.kind != Kind::text && node.kind != Kind::interpolation && node.kind != Kind::missing) {
    return python_text(node);
  }
  char quote = node.text.find('\'') != std::string::npos && node.text.find('"') == std::string::npos
                   ? '"'
                   : '\'';
  std::string result(1, quote);
  for (char c : node.text) {
    if (c == quote || c == '\\') {
      result += '\\';
      result += c;
    } else if (c == '\n') {
      result += "\\n";
    } else if (c == '\t') {
      result += "\\t";
    } else {
      result += c;
    }
  }
  return result + quote;
}

}  // namespace

std::string python_text(const Node& node) {
  switch (node.kind) {
    case Kind::null:
      return "None";
    case Kind::boolean:
      return node.boolean ? "True" : "False";
    case Kind::integer:
      return std::to_string(node.integer);
    case Kind::real:
      return python_float(node.real);
    case Kind::missing:
    case Kind::text:
    case Kind::interpolation:
      return node.text;
    case Kind::list: {
      std::string result = "[";
      for (const auto& item : node.items) {
        if (result.size() > 1) result += ", ";
        result += python_repr(*item);
      }
      return result + "]";
    }
    case Kind::mapping: {
      std::string result = "{";
      for (const auto& [key, value] : node.entries) {
        if (result.size() > 1) result += ", ";
        result += key.kind == Kind::text      ? python_repr(*make_plain_text(key.text))
                  : key.kind == Kind::boolean ? (key.text == "true" ? "True" : "False")
                                              : key.text;
        result += ": " + python_repr(*value);
      }
      return result + "}";
    }
  }
  return "";
}

std::string describe_value(const Node& node) {
  switch (node.kind) {
    case Kind::null:
      return "null";
    case Kind::missing:
      return "???";
    case Kind::boolean:
      return node.boolean ? "true" : "false";
    case Kind::text:
    case Kind::interpolation:
      return "\"" + node.text + "\"";
    case Kind::list:
      return "a list";
    case Kind::mapping:
      return "a mapping";
    default:
      return python_text(node);
  }
}

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::null:
      return "null";
    case Kind::missing:
      return "missing";
    case Kind::boolean:
      return "boolean";
    case Kind::integer:
      return "integer";
    case Kind::real:
      return "number";
    case Kind::text:
      return "string";
    case Kind::interpolation:
      return "interpolation";
    case Kind::list:
      return "list";
    case Kind::mapping:
      return "mapping";
  }
  return "";
}

}  // namespace espalier::config
