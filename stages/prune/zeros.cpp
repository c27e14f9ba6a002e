#include "stages/prune/zeros.h"

#include <algorithm>
#include <cfloat>

namespace espalier::prune {

void put_zeros_first(const TileView& view, float* score) {
  const float* weights = view.weights;  // locals, so that the loop vectorises
  const int64_t size = view.size;
  for (int64_t i = 0; i < size; ++i) score[i] = weights[i] == 0 ? 0 : std::max(score[i], FLT_MIN);
}

}  // namespace espalier::prune
