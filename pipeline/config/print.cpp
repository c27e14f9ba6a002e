#include "pipeline/config/print.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "pipeline/config/scalars.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

std::string double_quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    switch (c) {
      case '"':
        result += "\\\"";
        break;
      case '\\':
        result += "\\\\";
        break;
      case '\n':
        result += "\\n";
        break;
      case '\r':
        result += "\\r";
        break;
      case '\t':
        result += "\\t";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          char buffer[8];
          std::snprintf(buffer, sizeof buffer, "\\u%04x",
                        static_cast<unsigned>(static_cast<unsigned char>(c)));
          result += buffer;
        } else {
          result += c;
        }
    }
  }
  return result + "\"";
}

/// True when a bare word reads back as this very text in block context.
bool reads_back_bare(const std::string& text) {
  static const std::string first = "-?:,[]{}#&*!|>'\"%@`=<", anywhere = "\n\r\t\\\"";
  if (text.empty() || first.find(text[0]) != std::string::npos) return false;
  if (text.front() == ' ' || text.back() == ' ' || text.back() == ':') return false;
  if (text.find(": ") != std::string::npos || text.find(" #") != std::string::npos) return false;
  if (text.find_first_of(anywhere) != std::string::npos || text.starts_with("...")) return false;
  if (std::any_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c >= 0x7f; }))
    return false;
  static const std::vector<std::string> older_booleans = {"y", "Y", "n", "N"};
  if (std::find(older_booleans.begin(), older_booleans.end(), text) != older_booleans.end())
    return false;
  // A date is a text for OmegaConf and a date for YAML 1.1.
  if (text.size() >= 8 && text[4] == '-' && std::isdigit(static_cast<unsigned char>(text[0])))
    return false;
  try {
    Kind kind = yaml_scalar(text)->kind;
    return kind == Kind::text || kind == Kind::interpolation || kind == Kind::missing;
  } catch (const UserError&) {
    return false;
  }
}

std::string yaml_text(const std::string& text) {
  if (reads_back_bare(text)) return text;
  bool plain =
      std::none_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
  if (!plain) return double_quoted(text);
  std::string result = "'";
  for (char c : text) result += c == '\'' ? "''" : std::string(1, c);
  return result + "'";
}

std::string yaml_real(double value) {
  if (std::isnan(value)) return ".nan";
  if (std::isinf(value)) return value < 0 ? "-.inf" : ".inf";
  std::string text = python_float(value);
  size_t exponent = text.find('e');
  // YAML 1.1 wants the point: 1e-05 is a text there.
  if (exponent != std::string::npos && text.find('.') == std::string::npos)
    text.insert(exponent, ".0");
  return text;
}

std::string yaml_scalar_text(const Node& node) {
  switch (node.kind) {
    case Kind::null:
      return "null";
    case Kind::missing:
      return "???";
    case Kind::boolean:
      return node.boolean ? "true" : "false";
    case Kind::integer:
      return std::to_string(node.integer);
    case Kind::real:
      return yaml_real(node.real);
    case Kind::list:
      return "[]";
    case Kind::mapping:
      return "{}";
    default:
      return yaml_text(node.text);
  }
}

bool has_children(const Node& node) { return !node.items.empty() || !node.entries.empty(); }

void write_yaml(const Node& node, size_t indent, bool first_is_placed, std::string& out) {
  std::string margin(indent, ' ');
  bool placed = first_is_placed;
  for (const auto& [key, value] : node.entries) {
    if (!placed) out += margin;
    placed = false;
    out += (key.kind == Kind::text ? yaml_text(key.text) : key.text) + ":";
    if (!has_children(*value)) {
      out += " " + yaml_scalar_text(*value) + "\n";
    } else {
      out += "\n";
      write_yaml(*value, value->kind == Kind::list ? indent : indent + 2, false, out);
    }
  }
  for (const auto& item : node.items) {
    if (!placed) out += margin;
    placed = false;
    out += "- ";
    if (has_children(*item)) {
      write_yaml(*item, indent + 2, true, out);
    } else {
      out += yaml_scalar_text(*item) + "\n";
    }
  }
}

void write_json(const Node& node, bool sorted_keys, std::string& out) {
  switch (node.kind) {
    case Kind::null:
      out += "null";
      return;
    case Kind::boolean:
      out += node.boolean ? "true" : "false";
      return;
    case Kind::integer:
      out += std::to_string(node.integer);
      return;
    case Kind::missing:
      out += "\"???\"";
      return;
    case Kind::real:
      out += std::isnan(node.real)   ? "NaN"
             : std::isinf(node.real) ? (node.real < 0 ? "-Infinity" : "Infinity")
                                     : python_float(node.real);
      return;
    case Kind::text:
    case Kind::interpolation:
      out += double_quoted(node.text);
      return;
    case Kind::list: {
      out += "[";
      for (size_t i = 0; i < node.items.size(); ++i) {
        if (i) out += ",";
        write_json(*node.items[i], sorted_keys, out);
      }
      out += "]";
      return;
    }
    case Kind::mapping: {
      auto entries = node.entries;
      if (sorted_keys) {
        std::stable_sort(entries.begin(), entries.end(),
                         [](const auto& a, const auto& b) { return a.first.text < b.first.text; });
      }
      out += "{";
      for (size_t i = 0; i < entries.size(); ++i) {
        if (i) out += ",";
        out += double_quoted(entries[i].first.text) + ":";
        write_json(*entries[i].second, sorted_keys, out);
      }
      out += "}";
      return;
    }
  }
}

}  // namespace

std::string to_yaml(const Node& node) {
  if (!has_children(node)) return yaml_scalar_text(node) + "\n";
  std::string out;
  write_yaml(node, 0, false, out);
  return out;
}

std::string to_json(const Node& node, bool sorted_keys) {
  std::string out;
  write_json(node, sorted_keys, out);
  return out;
}

}  // namespace espalier::config
