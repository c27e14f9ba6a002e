#include "stages/discover/largest.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace espalier::discover {
namespace {

/// Values looked at together: most pieces hold nothing large enough.
constexpr size_t kPiece = 64;

float largest_of(const float* values, size_t count) {
  float lanes[16] = {};
  size_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (size_t lane = 0; lane < 16; ++lane)
      lanes[lane] = std::max(lanes[lane], std::abs(values[i + lane]));
  for (; i < count; ++i) lanes[0] = std::max(lanes[0], std::abs(values[i]));
  return *std::max_element(lanes, lanes + 16);
}

}  // namespace

std::vector<int64_t> largest_positions(std::span<const float> values, int64_t count, float floor) {
  // (magnitude, -position): the least of the chosen is on top.
  std::vector<std::pair<float, int64_t>> chosen;
  const auto greater = std::greater<std::pair<float, int64_t>>();
  float bound = floor;
  for (size_t begin = 0; begin < values.size() && count > 0; begin += kPiece) {
    const size_t end = std::min(begin + kPiece, values.size());
    if (!(largest_of(values.data() + begin, end - begin) > bound)) continue;
    for (size_t i = begin; i < end; ++i) {
      const float magnitude = std::abs(values[i]);
      if (!(magnitude > bound)) continue;  // an equal one stands further back: it loses
      if (static_cast<int64_t>(chosen.size()) == count) {
        std::pop_heap(chosen.begin(), chosen.end(), greater);
        chosen.pop_back();
      }
      chosen.emplace_back(magnitude, -static_cast<int64_t>(i));
      std::push_heap(chosen.begin(), chosen.end(), greater);
      if (static_cast<int64_t>(chosen.size()) == count) bound = chosen.front().first;
    }
  }
  std::vector<int64_t> positions;
  for (const auto& [magnitude, negative] : chosen) positions.push_back(-negative);
  std::sort(positions.begin(), positions.end());
  return positions;
}

}  // namespace espalier::discover
