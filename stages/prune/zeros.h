#pragma once
/// Zeros of an already sparse model, which go before every weight that is there.

#include "stages/prune/tile_access.h"

namespace espalier::prune {

/// score = w == 0 ? 0 : max(score, FLT_MIN) over a tile: a weight whose score is 0, as its input is
/// silent or nothing changed it, must not go before one that is not there.
void put_zeros_first(const TileView& view, float* score);

}  // namespace espalier::prune
