#include "stages/prune/plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "pipeline/driver/text_table.h"

namespace espalier::prune {
namespace {

struct Totals {
  int64_t matrices = 0, weights = 0, zeros = 0, skipped = 0;
  bool known = true;  ///< every matrix's number of zeros
};

std::string sparsity_text(const PlannedLayer& layer, const Options& options) {
  const std::string text = fmt::format("{:.4g}", layer.pattern.sparsity);
  return options.allocation.owl && !layer.overridden ? text + " by owl" : text;
}

/// Pattern, sparsity, zeros of one matrix.
std::vector<std::string> cells_of(const PlannedLayer& layer, const PruningMethod& method,
                                  const Options& options, Totals& totals) {
  const int64_t rows = layer.linear.out, columns = layer.linear.in;
  const bool allocated = options.allocation.owl && !layer.overridden;
  const int64_t zeros =
      allocated ? -1 : method.zeros(layer.pattern, rows, columns).value_or(-1);  // -1: unknown
  ++totals.matrices;
  totals.weights += rows * columns;
  totals.zeros += zeros;
  totals.known = totals.known && zeros >= 0;
  return {fmt::format("{} x {}", rows, columns), layer.pattern.name(),
          sparsity_text(layer, options), zeros < 0 ? "-" : fmt::format("{}", zeros)};
}

/// The pooler's row, by its name without ".weight".
std::vector<std::string> pooler_row(const std::string& weight, const PruningMethod& method,
                                    const Options& options, int64_t hidden, Totals& totals) {
  PlannedLayer layer{{}, options.layers.pattern, false};
  layer.linear.out = layer.linear.in = hidden;
  std::vector<std::string> row = {weight.substr(0, weight.rfind('.'))};
  if (chooses(options.layers, weight)) {
    const auto cells = cells_of(layer, method, options, totals);
    row.insert(row.end(), cells.begin(), cells.end());
  } else {
    row.insert(row.end(), {fmt::format("{0} x {0}", hidden), "skipped", "", ""});
    ++totals.skipped;
  }
  return row;
}

std::string zeros_text(const PruningMethod& method, const Pattern& pattern, const Totals& totals) {
  const auto together = method.zeros_of_all(pattern, totals.weights);
  if (!totals.known && !together) return "zeros as the data decides";
  const int64_t zeros = totals.known ? totals.zeros : *together;
  const double share = totals.weights == 0
                           ? 0.0
                           : 100 * static_cast<double>(zeros) / static_cast<double>(totals.weights);
  if (totals.known) return fmt::format("{} zeros ({:.2f} %)", zeros, share);
  return fmt::format("{} zeros or one fewer ({:.2f} %), in each matrix as the data decides", zeros,
                     share);
}

std::string describe(const std::string& method_name, const Options& options) {
  std::string text = method_name;
  if (options.allocation.owl) text += ", allocation owl";
  if (options.refine.dsnot) text += ", refined by dsnot";
  if (options.refit) text += ", refitted";
  return text;
}

}  // namespace

driver::StagePlan plan_of(const std::string& method_name, const PruningMethod& method,
                          const Options& options, const model::Architecture& architecture,
                          const std::optional<std::string>& pooler) {
  if (const int64_t heads = options.layers.pattern.heads; heads > 0)
    return {{fmt::format("{}: {} of {} heads of each of {} blocks go", method_name, heads,
                         architecture.heads, architecture.blocks)},
            {}};
  std::vector<driver::BlockRow> rows;
  Totals totals;
  for (const model::Linear& linear : architecture.linears)
    for (int64_t block = 0; block < architecture.blocks; ++block) {
      const auto layers = planned_layers(options.layers, architecture, block);
      const auto layer = std::find_if(
          layers.begin(), layers.end(),
          [&](const PlannedLayer& planned) { return planned.linear.name == linear.name; });
      driver::BlockRow row{block, architecture.block_prefix, "." + linear.name, {}};
      if (layer != layers.end()) {
        row.cells = cells_of(*layer, method, options, totals);
      } else {
        row.cells = {fmt::format("{} x {}", linear.out, linear.in), "skipped", "", ""};
        ++totals.skipped;
      }
      rows.push_back(row);
    }
  driver::StagePlan plan{{describe(method_name, options)}, driver::folded_rows(rows)};
  plan.table.insert(plan.table.begin(),
                    {"matrix", "shape", "pattern", "sparsity", "zeros of each"});
  if (pooler)
    plan.table.push_back(pooler_row(*pooler, method, options, architecture.hidden, totals));
  plan.lines.push_back(
      fmt::format("{} matrices of {} weights, {}; {} skipped", totals.matrices, totals.weights,
                  zeros_text(method, options.layers.pattern, totals), totals.skipped));
  if (pooler && chooses(options.layers, *pooler) && (options.refine.dsnot || options.refit))
    plan.lines.push_back(kPoolerStays);
  return plan;
}

}  // namespace espalier::prune
