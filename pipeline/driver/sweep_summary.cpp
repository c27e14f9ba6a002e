#include "pipeline/driver/sweep_summary.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>
#include <set>

#include "pipeline/driver/run_directory.h"
#include "pipeline/driver/text_table.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/json.h"
#include "pipeline/io/manifest.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kSeedKey = "run.seed";
/// The figures that the table shows; the files hold all.
const std::vector<std::pair<std::string, std::string>> kShownFigures = {
    {"nonzeros", "nonzeros"},
    {"bytes", "bytes"},
    {"residual_bytes", "residual"},
    {"trainable_parameters", "trainable"}};

using Settings = std::map<std::string, std::string>;

/// "+retrain.extra=1" is {"retrain.extra", "1"}.
Settings settings_of(const std::vector<std::string>& overrides) {
  Settings settings;
  for (const std::string& text : overrides) {
    const size_t begin = text.find_first_not_of("+~"), equal = text.find('=');
    if (begin == std::string::npos) continue;
    settings[text.substr(begin, equal - begin)] =
        equal == std::string::npos ? "" : text.substr(equal + 1);
  }
  return settings;
}

/// Keys that have several values among the members.
std::vector<std::string> swept_keys(const std::vector<Settings>& members) {
  std::map<std::string, std::set<std::string>> values;
  for (const Settings& settings : members)
    for (const auto& [key, value] : settings) values[key].insert(value);
  std::vector<std::string> keys;
  for (const auto& [key, texts] : values)
    if (texts.size() > 1 && key != kSeedKey) keys.push_back(key);
  return keys;
}

std::vector<fs::path> stages_of(const fs::path& run_directory) {
  std::vector<fs::path> stages;
  if (!fs::is_directory(run_directory)) return stages;  // a member that has not begun
  for (const auto& entry : fs::directory_iterator(run_directory))
    if (is_stage_directory(entry.path())) stages.push_back(entry.path());
  std::sort(stages.begin(), stages.end(), [](const fs::path& a, const fs::path& b) {
    return std::atoi(a.filename().c_str()) < std::atoi(b.filename().c_str());
  });
  return stages;
}

json number_or_null(const json& object, const std::string& key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? *found : json();
}

/// The row of one task: its reported metrics, the leading one first in the row's list.
json task_figures(const json& row, const std::string& entry) {
  json task = {{"entry", entry}, {"leading", nullptr}, {"reported", json::object()}};
  const json names = row.value("reported", json::array());
  for (const json& name : names) {
    if (!name.is_string()) continue;
    if (task["leading"].is_null()) task["leading"] = name;
    task["reported"][name.get<std::string>()] = number_or_null(row, name);
  }
  return task;
}

/// {"values", "count", "median", "mean", "standard_deviation"} of what stands there in each member.
json figure_of(const std::vector<const json*>& members, const json::json_pointer& place) {
  json values = json::array();
  std::vector<double> numbers;
  for (const json* member : members) {
    values.push_back(member->contains(place) ? member->at(place) : json());
    if (values.back().is_number()) numbers.push_back(values.back().get<double>());
  }
  json figure = {{"values", values},
                 {"count", numbers.size()},
                 {"median", nullptr},
                 {"mean", nullptr},
                 {"standard_deviation", nullptr}};
  if (numbers.empty()) return figure;
  const Statistics statistics = statistics_of(numbers);
  figure["median"] = statistics.median;
  figure["mean"] = statistics.mean;
  if (statistics.standard_deviation) figure["standard_deviation"] = *statistics.standard_deviation;
  return figure;
}

/// Members that differ in the seed alone.
struct Configuration {
  json settings = json::object(), seeds = json::array(), directories = json::array();
  std::vector<const json*> figures;
};

json summarize_one(const Configuration& configuration) {
  json tasks = json::object(), figures = json::object();
  for (const json* member : configuration.figures) {
    for (const auto& [name, task] : member->at("tasks").items())
      for (const auto& [metric, value] : task.at("reported").items()) {
        const auto place = json::json_pointer("/tasks") / name / "reported" / metric;
        json& summary = tasks[name];
        summary["entry"] = task.at("entry");
        summary["leading"] = task.at("leading");
        summary["reported"][metric] = figure_of(configuration.figures, place);
      }
    for (const auto& [name, value] : member->at("figures").items())
      figures[name] = figure_of(configuration.figures, json::json_pointer("/figures") / name);
  }
  return {{"settings", configuration.settings},
          {"seeds", configuration.seeds},
          {"members", configuration.directories},
          {"tasks", tasks},
          {"figures", figures}};
}

std::string number_text(const std::string& name, double value) {
  if (name == "bytes" || name == "residual_bytes") return fmt::format("{:.1f} MB", value / 1e6);
  if (name == "nonzeros") return fmt::format("{:.1f} M", value / 1e6);
  if (name == "trainable_parameters") return fmt::format("{:.0f}", value);
  return fmt::format("{:.{}f}", value, name == "perplexity" ? 3 : 4);
}

/// "27.84", or of several seeds "27.84 (27.90 ± 0.12)"; of fewer numbers than seeds, how many.
std::string cell_of(const std::string& name, const json& figure) {
  const json& values = figure.at("values");
  if (figure.at("count") == 0) return "-";
  const bool same = std::all_of(values.begin(), values.end(),
                                [&](const json& value) { return value == values.front(); });
  std::string text = number_text(name, figure.at("median"));
  if (same) return text;
  text += " (" + number_text(name, figure.at("mean"));
  if (figure.at("standard_deviation").is_number())
    text += " ± " + number_text(name, figure.at("standard_deviation"));
  if (figure.at("count") != values.size())
    text += fmt::format("; {} of {}", figure.at("count").get<int64_t>(), values.size());
  return text + ")";
}

/// {task, metric} of every configuration, the leading metrics alone or all.
std::vector<std::pair<std::string, std::string>> metrics_of(const json& summary, bool all) {
  std::set<std::pair<std::string, std::string>> found;
  for (const json& configuration : summary.at("configurations"))
    for (const auto& [name, task] : configuration.at("tasks").items())
      for (const auto& [metric, figure] : task.at("reported").items())
        if (all || metric == task.at("leading")) found.emplace(name, metric);
  return {found.begin(), found.end()};
}

bool any_has_figure(const json& summary, const std::string& name) {
  const json& all = summary.at("configurations");
  return std::any_of(all.begin(), all.end(), [&](const json& configuration) {
    return configuration.at("figures").contains(name);
  });
}

std::string quoted(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string result = "\"";
  for (const char c : text) result += c == '"' ? std::string("\"\"") : std::string(1, c);
  return result + "\"";
}

}  // namespace

Statistics statistics_of(std::vector<double> values) {
  if (values.empty()) throw DefectError("statistics of no number");
  std::sort(values.begin(), values.end());
  const size_t count = values.size();
  const auto n = static_cast<double>(count);
  Statistics statistics;
  statistics.count = static_cast<int64_t>(count);
  statistics.median =
      count % 2 == 1 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
  statistics.mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  if (count < 2) return statistics;
  double squares = 0;
  for (const double value : values)
    squares += (value - statistics.mean) * (value - statistics.mean);
  statistics.standard_deviation = std::sqrt(squares / (n - 1));
  return statistics;
}

json read_figures(const fs::path& run_directory) {
  json result = {{"tasks", json::object()}, {"figures", json::object()}};
  json& figures = result["figures"];
  for (const fs::path& stage : stages_of(run_directory)) {
    const fs::path file = stage / "metrics.json";
    if (!io::read_manifest(stage) || !fs::exists(file)) continue;
    const json metrics = io::parse_json(io::read_file(file), file.string());
    const json tasks = metrics.value("tasks", json::object());
    const json model = metrics.value("model", json::object());
    for (const auto& [name, row] : tasks.items())
      result["tasks"][name] = task_figures(row, stage.filename().string());
    for (const auto& [name, value] : model.items())
      if (value.is_number()) figures[name] = value;
    for (const char* name : {"trainable_parameters", "reported_parameters", "head_parameters"})
      if (metrics.contains(name)) figures[name] = number_or_null(metrics, name);
    if (metrics.contains("share")) figures["residual_bytes"] = number_or_null(metrics, "bytes");
  }
  return result;
}

json summarize(const std::vector<std::pair<SweepMember, json>>& members) {
  std::vector<Settings> settings;
  for (const auto& [member, figures] : members) settings.push_back(settings_of(member.overrides));
  const std::vector<std::string> keys = swept_keys(settings);
  std::vector<Configuration> configurations;
  for (size_t i = 0; i < members.size(); ++i) {
    json own = json::object();
    for (const std::string& key : keys) own[key] = settings[i][key];
    auto place = std::find_if(configurations.begin(), configurations.end(),
                              [&](const auto& one) { return one.settings == own; });
    if (place == configurations.end()) {
      configurations.emplace_back();
      place = configurations.end() - 1;
      place->settings = own;
    }
    place->seeds.push_back(members[i].first.seed);
    place->directories.push_back(members[i].first.directory.string());
    place->figures.push_back(&members[i].second);
  }
  json summary = {{"seed_key", kSeedKey},
                  {"standard_deviation", "of a sample (n - 1)"},
                  {"swept", keys},
                  {"configurations", json::array()}};
  for (const Configuration& configuration : configurations)
    summary["configurations"].push_back(summarize_one(configuration));
  return summary;
}

std::vector<std::vector<std::string>> table_of(const json& summary) {
  std::vector<std::string> titles = summary.at("swept");
  titles.emplace_back("seeds");
  const auto metrics = metrics_of(summary, /*all=*/false);
  for (const auto& [task, metric] : metrics) titles.push_back(task + " " + metric);
  for (const auto& [name, title] : kShownFigures)
    if (any_has_figure(summary, name)) titles.push_back(title);
  std::vector<std::vector<std::string>> rows = {titles};
  for (const json& configuration : summary.at("configurations")) {
    std::vector<std::string> row;
    for (const std::string key : summary.at("swept")) row.push_back(configuration["settings"][key]);
    row.push_back(fmt::format("{}", configuration["seeds"].size()));
    for (const auto& [task, metric] : metrics) {
      const auto place = json::json_pointer("/tasks") / task / "reported" / metric;
      row.push_back(configuration.contains(place) ? cell_of(metric, configuration[place]) : "-");
    }
    for (const auto& [name, title] : kShownFigures) {
      if (!any_has_figure(summary, name)) continue;
      const json& figures = configuration["figures"];
      row.push_back(figures.contains(name) ? cell_of(name, figures[name]) : "-");
    }
    rows.push_back(row);
  }
  return rows;
}

std::string csv_of(const json& summary) {
  std::vector<std::pair<std::string, json::json_pointer>> figures;
  for (const auto& [task, metric] : metrics_of(summary, /*all=*/true))
    figures.emplace_back(task + "." + metric,
                         json::json_pointer("/tasks") / task / "reported" / metric);
  std::set<std::string> names;
  for (const json& configuration : summary.at("configurations"))
    for (const auto& [name, figure] : configuration.at("figures").items()) names.insert(name);
  for (const std::string& name : names)
    figures.emplace_back(name, json::json_pointer("/figures") / name);

  const std::vector<std::string> parts = {"count", "median", "mean", "standard_deviation"};
  std::vector<std::string> cells;
  for (const std::string key : summary.at("swept")) cells.push_back(quoted(key));
  cells.emplace_back("seeds");
  for (const auto& [name, place] : figures)
    for (const std::string& part : parts) cells.push_back(quoted(name + "." + part));
  std::string text = fmt::format("{}\n", fmt::join(cells, ","));
  for (const json& configuration : summary.at("configurations")) {
    cells.clear();
    for (const std::string key : summary.at("swept"))
      cells.push_back(quoted(configuration["settings"][key]));
    std::vector<uint64_t> seeds = configuration["seeds"];
    cells.push_back(fmt::format("{}", fmt::join(seeds, " ")));
    for (const auto& [name, place] : figures)
      for (const std::string& part : parts) {
        const json value = configuration.value(place / part, json());
        cells.push_back(value.is_null() ? "" : value.dump());
      }
    text += fmt::format("{}\n", fmt::join(cells, ","));
  }
  return text;
}

void write_members(const fs::path& sweep_directory, const std::vector<SweepMember>& members) {
  json names = json::array();
  for (const SweepMember& member : members) names.push_back(member.directory.filename().string());
  const json content = {{"members", names}};
  io::write_file(sweep_directory / kSweepFile,
                 content.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

void write_summary(const fs::path& sweep_directory, const std::vector<SweepMember>& members) {
  std::vector<std::pair<SweepMember, json>> read;
  for (const SweepMember& member : members)
    read.emplace_back(member, read_figures(member.directory));
  const json summary = summarize(read);
  io::write_file(sweep_directory / "summary.json", summary.dump(2) + "\n");
  io::write_file(sweep_directory / "summary.csv", csv_of(summary));
  fmt::print("\n");
  fmt::print("{}", text_table(table_of(summary)));
  const bool several =
      std::any_of(summary["configurations"].begin(), summary["configurations"].end(),
                  [](const json& one) { return one["seeds"].size() > 1; });
  if (several)
    fmt::print("of several seeds: median (mean ± standard deviation of a sample, n - 1)\n");
  fmt::print("\nthe sweep's summary: {}\n", (sweep_directory / "summary.json").string());
  std::fflush(stdout);
}

}  // namespace espalier::driver
