#include "stages/prune/matrix_pruning.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pipeline/errors.h"
#include "stages/prune/kernels.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

int64_t packed_bytes(int64_t marks) { return (marks + 7) / 8; }

void pack(const uint8_t* marks, int64_t count, std::byte* bits) {
  for (int64_t i = 0; i < count; i += 8) {
    unsigned packed = 0;
    for (int64_t b = 0; b < std::min<int64_t>(8, count - i); ++b) packed |= marks[i + b] << b;
    bits[i / 8] = static_cast<std::byte>(packed);
  }
}

void unpack(const std::byte* bits, int64_t count, uint8_t* marks) {
  for (int64_t i = 0; i < count; i += 8)
    for (int64_t b = 0; b < std::min<int64_t>(8, count - i); ++b)
      marks[i + b] = (static_cast<unsigned>(bits[i / 8]) >> b) & 1;
}

int64_t travelling_bytes(const TileView& view, bool weights_changed) {
  const int64_t weights = weights_changed ? view.size * static_cast<int64_t>(sizeof(float)) : 0;
  return packed_bytes(view.size) + weights;
}

std::vector<Tile> tiles_of_task(std::span<const Tile> tiles, int64_t task) {
  std::vector<Tile> result;
  for (const Tile& tile : tiles)
    if (tile.task == task) result.push_back(tile);
  return result;
}

std::vector<std::byte> pack_tiles(const MatrixTask& task, std::span<const Tile> tiles,
                                  bool weights_changed) {
  std::vector<std::byte> bytes;
  for (const Tile& tile : tiles) {
    const TileView view = view_of(task, tile);
    const size_t start = bytes.size();
    bytes.resize(start + static_cast<size_t>(travelling_bytes(view, weights_changed)));
    std::byte* out = bytes.data() + start;
    pack(view.pruned, view.size, out);
    if (weights_changed)
      std::memcpy(out + packed_bytes(view.size), view.weights,
                  static_cast<size_t>(view.size) * sizeof(float));
  }
  return bytes;
}

void unpack_tiles(const MatrixTask& task, std::span<const Tile> tiles, bool weights_changed,
                  std::span<const std::byte> bytes) {
  for (const Tile& tile : tiles) {
    const TileView view = view_of(task, tile);
    const auto length = static_cast<size_t>(travelling_bytes(view, weights_changed));
    if (bytes.size() < length)
      throw DefectError(fmt::format("{}: a rank sent {} bytes too few of its rows", task.name,
                                    length - bytes.size()));
    unpack(bytes.data(), view.size, view.pruned);
    if (weights_changed)
      std::memcpy(view.weights, bytes.data() + packed_bytes(view.size),
                  static_cast<size_t>(view.size) * sizeof(float));
    else
      apply_mask(view.weights, view.pruned, view.size);
    bytes = bytes.subspan(length);
  }
}

}  // namespace

std::vector<Tile> tiles_of_rank(std::span<const MatrixTask> tasks, int rank, int size) {
  std::vector<Tile> mine;
  int64_t number = 0;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const int64_t rows = tasks[t].weight.size(0);
    for (int64_t first = 0; first < rows; first += kTileRows, ++number)
      if (number % size == rank)
        mine.push_back({static_cast<int64_t>(t), first, std::min(kTileRows, rows - first)});
  }
  return mine;
}

TileView view_of(const MatrixTask& task, const Tile& tile) {
  const int64_t columns = task.weight.size(1), offset = tile.first * columns;
  return {task.weight.data_ptr<float>() + offset, task.mask.data_ptr<uint8_t>() + offset, tile.rows,
          columns, tile.rows * columns};
}

void check_tasks(std::span<const MatrixTask> tasks) {
  for (const MatrixTask& task : tasks) {
    const Pattern& pattern = task.pattern;
    const bool usable = task.weight.dim() == 2 && task.weight.is_contiguous() &&
                        task.weight.scalar_type() == at::kFloat && task.mask.is_contiguous() &&
                        task.mask.scalar_type() == at::kByte &&
                        task.mask.sizes() == task.weight.sizes();
    if (!usable)
      throw DefectError(
          fmt::format("{}: pruning takes contiguous float32 weights and a uint8 mask "
                      "of their shape",
                      task.name));
    if (!pattern.unstructured() && task.weight.size(1) % pattern.group != 0)
      throw UserError(fmt::format(
          "{}: pattern {} needs a number of inputs that {} divides, and this matrix has {}; "
          "exclude it (prune.exclude) or choose another pattern",
          task.name, pattern.name(), pattern.group, task.weight.size(1)));
  }
}

void require_finite(const MatrixTask& task, const TileView& view, const char* when) {
  // One running value stays finite when all are (0 * w is 0), and this loop vectorises.
  float zero[16] = {};
  int64_t i = 0;
  for (; i + 16 <= view.size; i += 16)
    for (int64_t lane = 0; lane < 16; ++lane) zero[lane] += 0 * view.weights[i + lane];
  for (; i < view.size; ++i) zero[0] += 0 * view.weights[i];
  for (const float lane : zero)
    if (lane != 0)
      throw NumericalError(
          fmt::format("{}: a weight is NaN or Inf {}; check the checkpoint and the calibration "
                      "data, or exclude "
                      "the matrix (prune.exclude)",
                      task.name, when));
}

void mark_zeros(const TileView& view) {
  const float* weights = view.weights;  // locals, so that the loop vectorises
  uint8_t* pruned = view.pruned;
  const int64_t size = view.size;
  for (int64_t i = 0; i < size; ++i) pruned[i] |= weights[i] == 0;
}

void gather_rows(std::span<MatrixTask> tasks, bool weights_changed,
                 const comm::Communicator& group) {
  if (group.size() == 1) return;
  std::vector<std::vector<Tile>> tiles;
  for (int rank = 0; rank < group.size(); ++rank)
    tiles.push_back(tiles_of_rank(tasks, rank, group.size()));
  for (size_t t = 0; t < tasks.size(); ++t) {
    const auto task = static_cast<int64_t>(t);
    const auto mine = pack_tiles(
        tasks[t], tiles_of_task(tiles[static_cast<size_t>(group.rank())], task), weights_changed);
    const auto all = group.all_gather(mine);
    for (int rank = 0; rank < group.size(); ++rank)
      if (rank != group.rank())
        unpack_tiles(tasks[t], tiles_of_task(tiles[static_cast<size_t>(rank)], task),
                     weights_changed, all[static_cast<size_t>(rank)]);
  }
}

}  // namespace espalier::prune
