#pragma once
/// A model of four units of random matrices with added terms, rounded so that every sum is exact in
/// float32 and quantities tie across matrices and units.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <vector>

#include "pipeline/random.h"
#include "stages/prune/dsee.h"

namespace espalier::prune {

inline constexpr int64_t kUnits = 4;

inline at::Tensor rounded(const std::string& name, int64_t rows, int64_t columns, double step) {
  const CounterRandom random(31, name);
  at::Tensor t = at::empty({rows, columns}, at::kFloat);
  for (int64_t i = 0; i < rows * columns; ++i)
    t.data_ptr<float>()[i] = static_cast<float>(std::round(random.normal(i) / step) * step);
  return t;
}

/// q and v have terms, larger ones in later units; the last unit is a pooler.
inline JudgedMatrices judged_unit(int64_t unit) {
  JudgedMatrices judged;
  const auto add = [&](const std::string& layer, int64_t rows, int64_t columns, bool terms) {
    const std::string name = fmt::format("model.layers.{}.{}.weight", unit, layer);
    const at::Tensor weight = rounded(name, rows, columns, 0.25);
    judged.tasks.push_back({name, weight, 0, at::zeros(weight.sizes(), at::kByte)});
    judged.terms.emplace_back();
    if (!terms) return;
    model::AddedTerms added;
    added.down = rounded(name + ".down", 2, columns, 0.5);
    added.up = rounded(name + ".up", rows, 2, 0.5) * static_cast<double>(unit);
    added.scale = 0.5;
    // The last of a row, the first, and one of the second tile.
    added.positions = at::tensor({columns - 1, columns, 129 * columns + 3}, at::kLong);
    added.values = at::tensor({4.0f, -2.0f, 0.25f});
    judged.terms.back() = added;
  };
  if (unit + 1 == kUnits) {
    add("pooler", 24, 24, false);
    return judged;
  }
  add("q", 140, 24, true);
  add("k", 24, 24, false);
  add("v", 131, 24, true);
  add("down", 24, 40, false);
  return judged;
}

inline DseeLosses losses_of(const DseeRule& rule, Workers& workers,
                            const comm::Communicator& group) {
  const std::vector<int64_t> sizes = {4, 4, 4, 1};
  return count_dsee_losses(sizes, judged_unit, rule, workers, group, [](int64_t) {});
}

/// The units with masks and masked weights, on every rank.
inline std::vector<JudgedMatrices> pruned_model(const DseeRule& rule, Workers& workers,
                                                const comm::Communicator& group) {
  const DseeLosses losses = losses_of(rule, workers, group);
  std::vector<JudgedMatrices> units;
  for (int64_t unit = 0; unit < kUnits; ++unit) {
    units.push_back(judged_unit(unit));
    prune_dsee(units.back().tasks, units.back().terms, losses.count[unit], rule, workers, group);
    gather_rows(units.back().tasks, false, group);
  }
  return units;
}

}  // namespace espalier::prune
