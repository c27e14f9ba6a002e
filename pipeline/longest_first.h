#pragma once
/// Which rank takes which unit, when units differ in work: in order of falling cost, each goes to
/// the rank with the least so far (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969:
/// at most 4/3 of the best possible time).

#include <cstdint>
#include <vector>

namespace espalier {

/// units[rank]: the units of each rank, longest first; ties go to the lower unit and the lower
/// rank, so that equal costs are dealt in turn. Every rank that asks finds the same.
std::vector<std::vector<int64_t>> longest_first(const std::vector<double>& costs, int ranks);

}  // namespace espalier
