#pragma once
/// The entries of largest magnitude: exact, ties to the lower index.

#include <cstdint>
#include <span>
#include <vector>

namespace espalier::discover {

/// Positions of the `count` values of largest magnitude among those with |value| > floor (floor >=
/// 0), ascending; of equal magnitudes the lower position wins. Fewer when fewer are above the
/// floor. One pass; values are finite.
std::vector<int64_t> largest_positions(std::span<const float> values, int64_t count, float floor);

}  // namespace espalier::discover
