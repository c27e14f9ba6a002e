#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <vector>

#include "pipeline/driver/progress.h"
#include "pipeline/driver/text_table.h"
#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {
namespace {

using json = nlohmann::ordered_json;
using Row = std::vector<std::string>;

bool ends_with(const std::string& key, const char* end) {
  return key == end || key.ends_with(std::string("_") + end);
}

/// 1234567 as "1,234,567".
std::string grouped(int64_t number) {
  std::string digits = std::to_string(number);
  const int64_t first = number < 0 ? 1 : 0;
  for (auto at = static_cast<int64_t>(digits.size()) - 3; at > first; at -= 3)
    digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

/// "model.layers.*.mlp.up_proj.weight": parts that are numbers are those of blocks or experts.
std::string without_numbers(const std::string& name) {
  std::string result, part;
  const auto end_part = [&] {
    const bool number = !part.empty() && std::all_of(part.begin(), part.end(), [](unsigned char c) {
      return std::isdigit(c) != 0;
    });
    result += number ? "*" : part;
    part.clear();
  };
  for (const char c : name) {
    if (c != '.' && c != '/' && c != '-') {
      part += c;
      continue;
    }
    end_part();
    result += c;
  }
  end_part();
  return result;
}

/// The texts of a list; of a long one those that differ in numbers alone once.
std::vector<std::string> parts_of(const json& list) {
  constexpr size_t kLong = 8;
  std::vector<std::string> parts;
  for (const json& part : list) {
    std::string text = part.is_string() ? part.get<std::string>() : part.dump();
    const bool name = text.find('.') != std::string::npos;
    if (list.size() > kLong && name) text = without_numbers(text);
    if (list.size() <= kLong || !name || std::find(parts.begin(), parts.end(), text) == parts.end())
      parts.push_back(std::move(text));
  }
  return parts;
}

/// "31 of 250 steps, 3.7/s, 0:59 left, 0:12 so far, told 1 s ago, loss 2.31".
std::string progress_text(const json& progress) {
  Row parts;
  if (progress.contains("phase"))
    parts.push_back(fmt::format("{} of {} {}", progress.value("done", int64_t{0}),
                                progress.value("total", int64_t{0}), progress.value("phase", "")));
  if (progress.contains("per_second"))
    parts.push_back(fmt::format("{:.3g}/s", progress.value("per_second", 0.0)));
  if (progress.contains("seconds_left"))
    parts.push_back(driver::clock_text(progress.value("seconds_left", 0.0)) + " left");
  parts.push_back(driver::clock_text(progress.value("seconds", 0.0)) + " so far");
  parts.push_back(fmt::format("told {:.0f} s ago", progress.value("told_seconds_ago", 0.0)));
  if (progress.contains("detail")) parts.push_back(progress.value("detail", ""));
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::string text_of_value(const std::string& key, const json& value) {
  if (key == "progress" && value.is_object()) return progress_text(value);
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_number_integer() && (key == "seed" || key == "cardinality")) return value.dump();
  if (value.is_number_integer()) return grouped(value.get<int64_t>());
  if (value.is_number() && (ends_with(key, "sparsity") || ends_with(key, "share")))
    return fmt::format("{:.2f} %", 100 * value.get<double>());
  if (value.is_number()) return fmt::format("{:.4g}", value.get<double>());
  if (!value.is_array()) return value.dump();
  return fmt::format("{}", fmt::join(parts_of(value), key == "shape" ? " x " : ", "));
}

std::string words(std::string key) {
  std::replace(key.begin(), key.end(), '_', ' ');
  return key;
}

/// The value that all have, or the range of the numbers.
std::string merged(const std::string& key, const std::vector<json>& values) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  const std::string smallest = text_of_value(key, *low), largest = text_of_value(key, *high);
  if (smallest == largest) return smallest;
  if (low->is_number() && high->is_number()) return smallest + " to " + largest;
  return "several";
}

bool is_table(const json& value) {
  return value.is_array() && !value.empty() && value[0].is_object();
}

std::string table_of(const json& rows, bool folding) {
  std::vector<std::string> names, keys;
  std::map<std::string, std::vector<json>> alike;
  for (const json& row : rows) {
    for (const auto& [key, value] : row.items())
      if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
    const std::string own = row.value("name", "");
    std::string name = folding ? without_numbers(own) : own;
    if (row.contains("shape")) name += row["shape"].dump();
    if (!alike.contains(name)) names.push_back(name);
    alike[name].push_back(row);
  }
  std::erase(keys, "name");
  const bool counted = names.size() < rows.size();
  Row header = {"name"};
  if (counted) header.push_back("number");
  for (const std::string& key : keys) header.push_back(words(key));
  std::vector<Row> lines = {header};
  for (const std::string& name : names) {
    const std::vector<json>& group = alike[name];
    const std::string own = group.front().value("name", "");
    Row line = {group.size() == 1 ? own : without_numbers(own)};
    if (counted) line.push_back(std::to_string(group.size()));
    for (const std::string& key : keys) {
      std::vector<json> values;
      for (const json& row : group)
        if (row.contains(key)) values.push_back(row[key]);
      line.push_back(values.empty() ? "" : merged(key, values));
    }
    lines.push_back(std::move(line));
  }
  return driver::text_table(lines, "  ");
}

}  // namespace

std::string text_of(const json& inspection) {
  std::vector<Row> facts;
  std::string tables;
  for (const auto& [key, value] : inspection.items()) {
    if (is_table(value)) {
      tables +=
          fmt::format("\n{}\n{}", words(key), table_of(value, key != "members" && key != "stages"));
    } else if (value.is_object() && key != "progress") {
      for (const auto& [inner, part] : value.items())
        facts.push_back({words(key) + ": " + words(inner), text_of_value(inner, part)});
    } else if (!value.is_null() && !(value.is_array() && value.empty())) {
      facts.push_back({words(key), text_of_value(key, value)});
    }
  }
  return driver::text_table(facts) + tables;
}

}  // namespace espalier::inspect
