#include "pipeline/driver/units.h"

#include <fmt/format.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/longest_first.h"

namespace espalier::driver {
namespace {

/// Units a worker takes between two looks at the signals.
constexpr int64_t kUnitsOfARound = 4;

}  // namespace

void carry_out_units(const std::string& what, const std::vector<double>& costs,
                     std::vector<int64_t> done, const comm::Communicator& group, Workers& workers,
                     const Hooks& hooks, const std::function<void(int64_t)>& body,
                     bool count_done) {
  const auto units = static_cast<int64_t>(costs.size());
  done.resize(costs.size(), 0);
  group.all_reduce_max(std::span<int64_t>(done));
  std::vector<int64_t> pending;
  std::vector<double> pending_costs;
  for (int64_t unit = 0; unit < units; ++unit) {
    if (done[unit]) continue;
    pending.push_back(unit);
    pending_costs.push_back(costs[unit]);
  }
  const auto mine = longest_first(pending_costs, group.size())[group.rank()];
  const int64_t count = static_cast<int64_t>(mine.size());
  const int64_t width = kUnitsOfARound * workers.count();
  int64_t rounds = (count + width - 1) / width;
  group.all_reduce_max(std::span<int64_t>(&rounds, 1));
  const auto to_do = static_cast<int64_t>(pending.size());
  const int64_t total = count_done ? units : to_do;
  int64_t finished = total - to_do;
  if (hooks.start) hooks.start(what, total, finished);
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t begin = std::min(round * width, count), end = std::min(begin + width, count);
    workers.for_each(end - begin, [&](int64_t i, int) { body(pending[mine[begin + i]]); });
    int64_t of_all = end - begin;
    group.all_reduce_sum(std::span<int64_t>(&of_all, 1));
    finished += of_all;
    if (hooks.advance) hooks.advance(finished);
    if (finished < total && hooks.stop_requested && hooks.stop_requested())
      throw Requeue(
          fmt::format("stopped after {} of {} {}; what is done is saved, start the same "
                      "command again to go on",
                      finished, total, what));
  }
}

}  // namespace espalier::driver
