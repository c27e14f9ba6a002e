#include "pipeline/longest_first.h"

#include <algorithm>
#include <numeric>

namespace espalier {

std::vector<std::vector<int64_t>> longest_first(const std::vector<double>& costs, int ranks) {
  std::vector<int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return costs[a] > costs[b]; });
  std::vector<std::vector<int64_t>> units(ranks);
  std::vector<double> load(ranks, 0);
  for (int64_t unit : order) {
    const auto least = std::min_element(load.begin(), load.end());
    units[least - load.begin()].push_back(unit);
    *least += costs[unit];
  }
  return units;
}

}  // namespace espalier
