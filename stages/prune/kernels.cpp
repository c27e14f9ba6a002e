#include "stages/prune/kernels.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>

// Highway compiles what stands before HWY_ONCE once for every instruction set, and the wrappers at
// the end choose at run time.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "stages/prune/kernels.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace espalier::prune {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::ScalableTag<int32_t>;
using ByteTag = hn::Rebind<uint8_t, IntTag>;  // one byte for each float of a vector

void ScoreRow(const float* weights, const float* norm, int64_t columns, float* score) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) {
    const auto magnitude = hn::Abs(hn::LoadU(d, weights + j));
    hn::StoreU(norm ? hn::Mul(magnitude, hn::LoadU(d, norm + j)) : magnitude, d, score + j);
  }
  for (; j < columns; ++j)
    score[j] = norm ? std::fabs(weights[j]) * norm[j] : std::fabs(weights[j]);
}

void Scores(const float* weights, const float* norm, int64_t rows, int64_t columns, float* score) {
  for (int64_t i = 0; i < rows; ++i)
    ScoreRow(weights + i * columns, norm, columns, score + i * columns);
}

// Non-negative floats are ordered as their bits are, so selections work on int32.
auto LoadBits(const float* values) { return hn::BitCast(IntTag(), hn::LoadU(FloatTag(), values)); }

int64_t CountAbove(const float* values, int64_t n, int32_t limit) {
  const IntTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto bound = hn::Set(d, limit);
  auto even = hn::Zero(d), odd = hn::Zero(d);
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    even = hn::Sub(even, hn::VecFromMask(d, hn::Gt(LoadBits(values + j), bound)));
    odd = hn::Sub(odd, hn::VecFromMask(d, hn::Gt(LoadBits(values + j + lanes), bound)));
  }
  int64_t count = hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd)));
  for (; j < n; ++j) count += std::bit_cast<int32_t>(values[j]) > limit;
  return count;
}

void MarkAtMost(const float* values, int64_t n, int32_t limit, uint8_t* marks) {
  const IntTag d;
  const ByteTag bytes;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto bound = hn::Set(d, limit), one = hn::Set(d, 1);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const auto mark = hn::Add(one, hn::VecFromMask(d, hn::Gt(LoadBits(values + j), bound)));
    hn::StoreU(hn::DemoteTo(bytes, mark), bytes, marks + j);
  }
  for (; j < n; ++j) marks[j] = std::bit_cast<int32_t>(values[j]) <= limit;
}

void BitsRange(const float* values, int64_t n, int32_t& low, int32_t& high) {
  const IntTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  low = high = std::bit_cast<int32_t>(values[0]);
  auto least = hn::Set(d, low), most = least;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const auto bits = LoadBits(values + j);
    least = hn::Min(least, bits);
    most = hn::Max(most, bits);
  }
  low = hn::GetLane(hn::MinOfLanes(d, least));
  high = hn::GetLane(hn::MaxOfLanes(d, most));
  for (; j < n; ++j) {
    low = std::min(low, std::bit_cast<int32_t>(values[j]));
    high = std::max(high, std::bit_cast<int32_t>(values[j]));
  }
}

// Bisects on the bits of the value at position count - 1: a pass over a row of some thousand floats
// in cache costs less than a histogram's clearing, and most rows are split exactly long before the
// last bit.
void MarkSmallestInRow(const float* score, int64_t n, int64_t count, uint8_t* pruned) {
  if (count <= 0 || count >= n) {
    std::memset(pruned, count > 0, static_cast<size_t>(n));
    return;
  }
  int32_t low = 0, high = 0;
  BitsRange(score, n, low, high);
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t at_most = n - CountAbove(score, n, middle);
    if (at_most == count) {
      MarkAtMost(score, n, middle, pruned);
      return;
    }
    if (at_most > count)
      high = middle;
    else
      low = middle + 1;
  }
  MarkAtMost(score, n, low - 1, pruned);
  int64_t ties = count - (n - CountAbove(score, n, low - 1));
  for (int64_t j = 0; ties > 0; ++j)
    if (std::bit_cast<int32_t>(score[j]) == low) pruned[j] = 1, --ties;
}

void MarkSmallestInRows(const float* score, int64_t rows, int64_t columns, int64_t count,
                        uint8_t* pruned) {
  for (int64_t i = 0; i < rows; ++i)
    MarkSmallestInRow(score + i * columns, columns, count, pruned + i * columns);
}

// Any group: a place is the number of entries that come before.
void MarkGroup(const float* score, int64_t group, int64_t go, uint8_t* pruned) {
  for (int64_t j = 0; j < group; ++j) {
    int64_t place = 0;
    for (int64_t k = 0; k < j; ++k) place += score[k] <= score[j];
    for (int64_t k = j + 1; k < group; ++k) place += score[k] < score[j];
    pruned[j] = place < go;
  }
}

#if HWY_TARGET == HWY_SCALAR  // no 128-bit blocks
int64_t MarkFours(const float*, int64_t, int64_t, uint8_t*) { return 0; }
void MarkOneFour(const float* score, int64_t go, uint8_t* pruned) {
  MarkGroup(score, 4, go, pruned);
}
#else
// Marks of four floats of every 128-bit block: a lane goes when fewer than `go` lanes of its block
// come before it (smaller, or equal and further left). 1 or 0 as int32.
template <class D, class V>
auto MarksOfFour(D d, V score, int32_t go) {
  const hn::RebindToSigned<D> di;
  const auto lane = hn::And(hn::Iota(di, 0), hn::Set(di, 3));
  const auto is_odd = hn::MaskFromVec(
      hn::BitCast(d, hn::VecFromMask(di, hn::Eq(hn::And(lane, hn::Set(di, 1)), hn::Set(di, 1)))));
  const auto is_upper =
      hn::MaskFromVec(hn::BitCast(d, hn::VecFromMask(di, hn::Gt(lane, hn::Set(di, 1)))));
  const auto before = [&](auto other, auto other_is_left) {
    const auto mask = hn::Or(hn::Lt(other, score), hn::And(hn::Eq(other, score), other_is_left));
    return hn::BitCast(di, hn::VecFromMask(d, mask));
  };
  // Minus the number of lanes that come before.
  const auto place = hn::Add(
      hn::Add(before(hn::Shuffle2301(score), is_odd), before(hn::Shuffle1032(score), is_upper)),
      before(hn::Shuffle0123(score), is_upper));
  return hn::And(hn::VecFromMask(di, hn::Gt(place, hn::Set(di, -go))), hn::Set(di, 1));
}

// Groups of four, a vector at a time; returns how many of the n scores that were.
int64_t MarkFours(const float* score, int64_t n, int64_t go, uint8_t* pruned) {
  const FloatTag d;
  const ByteTag bytes;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    const auto marks = MarksOfFour(d, hn::LoadU(d, score + j), static_cast<int32_t>(go));
    hn::StoreU(hn::DemoteTo(bytes, marks), bytes, pruned + j);
  }
  return j;
}

void MarkOneFour(const float* score, int64_t go, uint8_t* pruned) {
  const hn::Full128<float> d;
  const hn::Rebind<uint8_t, hn::Full128<int32_t>> bytes;
  const auto marks = MarksOfFour(d, hn::LoadU(d, score), static_cast<int32_t>(go));
  hn::StoreU(hn::DemoteTo(bytes, marks), bytes, pruned);
}
#endif

void MarkSmallestInGroups(const float* score, int64_t rows, int64_t columns, int64_t keep,
                          int64_t group, uint8_t* pruned) {
  const int64_t n = rows * columns;  // the group divides the columns: rows need no care
  int64_t j = group == 4 ? MarkFours(score, n, 4 - keep, pruned) : 0;
  for (; j < n; j += group) MarkGroup(score + j, group, group - keep, pruned + j);
}

void ApplyMask(float* weights, const uint8_t* pruned, int64_t count) {
  const FloatTag d;
  const IntTag di;
  const ByteTag bytes;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const auto goes = hn::PromoteTo(di, hn::LoadU(bytes, pruned + j));
    const auto stays = hn::VecFromMask(di, hn::Eq(goes, hn::Zero(di)));
    hn::StoreU(hn::And(hn::LoadU(d, weights + j), hn::BitCast(d, stays)), d, weights + j);
  }
  for (; j < count; ++j)
    if (pruned[j]) weights[j] = 0;
}

float SparsegptScore(float weight, float diagonal) {
  return std::max((weight * weight) / (diagonal * diagonal), FLT_MIN);
}

void SparsegptScores(const float* weights, int64_t rows, int64_t columns, const float* diagonal,
                     int64_t first, int64_t width, const uint8_t* pruned, float* score) {
  const FloatTag d;
  const IntTag di;
  const ByteTag bytes;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < rows; ++i) {
    const float* w = weights + i * columns + first;
    const uint8_t* gone = pruned + i * columns + first;
    float* out = score + i * width;
    int64_t j = 0;
    for (; j + lanes <= width; j += lanes) {
      const auto value = hn::LoadU(d, w + j), r = hn::LoadU(d, diagonal + j);
      const auto goes = hn::PromoteTo(di, hn::LoadU(bytes, gone + j));
      const auto stays = hn::BitCast(d, hn::VecFromMask(di, hn::Eq(goes, hn::Zero(di))));
      const auto lost = hn::Div(hn::Mul(value, value), hn::Mul(r, r));
      hn::StoreU(hn::And(stays, hn::Max(lost, hn::Set(d, FLT_MIN))), d, out + j);
    }
    for (; j < width; ++j) out[j] = gone[j] ? 0 : SparsegptScore(w[j], diagonal[j]);
  }
}

void MarkColumnsAtMost(const float* score, int64_t rows, int64_t columns, int64_t first,
                       int64_t width, float threshold, uint8_t* pruned) {
  const int32_t limit = std::bit_cast<int32_t>(threshold);
  // What was pruned before has score 0 and is marked again.
  for (int64_t i = 0; i < rows; ++i)
    MarkAtMost(score + i * width, width, limit, pruned + i * columns + first);
}

// One row's group at its first column, by the weights as updated so far.
void MarkSparsegptGroup(const float* weights, const float* diagonal, int64_t keep, int64_t group,
                        uint8_t* pruned) {
  float score[64] = {};
  uint8_t marks[64];
  for (int64_t j = 0; j < group; ++j)
    score[j] = pruned[j] ? 0 : SparsegptScore(weights[j], diagonal[j]);
  if (group == 4)
    MarkOneFour(score, 4 - keep, marks);
  else
    MarkGroup(score, group, group - keep, marks);
  for (int64_t j = 0; j < group; ++j) pruned[j] |= marks[j];
}

// w_r[from:width) -= e_r R[from:width) for four rows, so that R is read once for them.
void SubtractOuter(float* const* w, const float* e, const float* factor_row, int64_t from,
                   int64_t width) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto e0 = hn::Set(d, e[0]), e1 = hn::Set(d, e[1]), e2 = hn::Set(d, e[2]),
             e3 = hn::Set(d, e[3]);
  float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
  int64_t k = from / lanes * lanes;  // what lies before `from` meets R's zeros
  for (; k + lanes <= width; k += lanes) {
    const auto r = hn::LoadU(d, factor_row + k);
    hn::StoreU(hn::NegMulAdd(e0, r, hn::LoadU(d, w0 + k)), d, w0 + k);
    hn::StoreU(hn::NegMulAdd(e1, r, hn::LoadU(d, w1 + k)), d, w1 + k);
    hn::StoreU(hn::NegMulAdd(e2, r, hn::LoadU(d, w2 + k)), d, w2 + k);
    hn::StoreU(hn::NegMulAdd(e3, r, hn::LoadU(d, w3 + k)), d, w3 + k);
  }
  for (; k < width; ++k)
    for (int r = 0; r < 4; ++r) w[r][k] -= e[r] * factor_row[k];
}

// `live` (1 to 4) rows through the block; w points to scratch, and e is 0, for the others.
void SparsegptFourRows(float* const* w, uint8_t* const* pruned, float* const* errors, int64_t live,
                       const float* factor, int64_t columns, const float* diagonal, int64_t width,
                       int64_t keep, int64_t group) {
  for (int64_t i = 0; i < width; ++i) {
    if (group > 0 && i % group == 0)
      for (int64_t r = 0; r < live; ++r)
        MarkSparsegptGroup(w[r] + i, diagonal + i, keep, group, pruned[r] + i);
    float e[4] = {0, 0, 0, 0};
    bool any = false;
    for (int64_t r = 0; r < live; ++r) {
      if (pruned[r][i]) e[r] = w[r][i] / diagonal[i];
      errors[r][i] = e[r];
      any |= e[r] != 0;
    }
    if (any) SubtractOuter(w, e, factor + i * columns, i, width);
    for (int64_t r = 0; r < live; ++r)
      if (pruned[r][i]) w[r][i] = 0;
  }
}

void SparsegptBlock(float* weights, int64_t rows, int64_t columns, const float* factor,
                    const float* diagonal, int64_t first, int64_t width, int64_t keep,
                    int64_t group, uint8_t* pruned, float* errors, float* idle) {
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t live = std::min<int64_t>(4, rows - i);
    float *w[4], *e[4];
    uint8_t* marks[4];
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t row = std::min(i + r, rows - 1);
      w[r] = r < live ? weights + row * columns + first : idle;
      marks[r] = pruned + row * columns + first;
      e[r] = errors + row * width;
    }
    SparsegptFourRows(w, marks, e, live, factor + first * columns + first, columns, diagonal, width,
                      keep, group);
  }
}

void SubtractColumns(float* weights, int64_t rows, int64_t columns, int64_t first, int64_t width,
                     const float* update) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < rows; ++i) {
    float* w = weights + i * columns + first;
    const float* u = update + i * width;
    int64_t j = 0;
    for (; j + lanes <= width; j += lanes)
      hn::StoreU(hn::Sub(hn::LoadU(d, w + j), hn::LoadU(d, u + j)), d, w + j);
    for (; j < width; ++j) w[j] -= u[j];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::prune
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <vector>

namespace espalier::prune {
namespace {

HWY_EXPORT(Scores);
HWY_EXPORT(MarkSmallestInRows);
HWY_EXPORT(MarkSmallestInGroups);
HWY_EXPORT(ApplyMask);
HWY_EXPORT(SparsegptScores);
HWY_EXPORT(MarkColumnsAtMost);
HWY_EXPORT(SparsegptBlock);
HWY_EXPORT(SubtractColumns);

std::vector<float> diagonal_of(const float* factor, int64_t columns, int64_t first, int64_t width) {
  std::vector<float> diagonal(static_cast<size_t>(width));
  for (int64_t j = 0; j < width; ++j) diagonal[j] = factor[(first + j) * columns + first + j];
  return diagonal;
}

}  // namespace

void scores(const float* weights, const float* norm, int64_t rows, int64_t columns, float* score) {
  HWY_DYNAMIC_DISPATCH(Scores)(weights, norm, rows, columns, score);
}

void mark_smallest_in_rows(const float* score, int64_t rows, int64_t columns, int64_t count,
                           uint8_t* pruned) {
  HWY_DYNAMIC_DISPATCH(MarkSmallestInRows)(score, rows, columns, count, pruned);
}

void mark_smallest_in_groups(const float* score, int64_t rows, int64_t columns,
                             const Pattern& pattern, uint8_t* pruned) {
  HWY_DYNAMIC_DISPATCH(MarkSmallestInGroups)
  (score, rows, columns, pattern.keep, pattern.group, pruned);
}

void apply_mask(float* weights, const uint8_t* pruned, int64_t count) {
  HWY_DYNAMIC_DISPATCH(ApplyMask)(weights, pruned, count);
}

void sparsegpt_scores(const float* weights, int64_t rows, int64_t columns, const float* factor,
                      int64_t first, int64_t width, const uint8_t* pruned, float* score) {
  const std::vector<float> diagonal = diagonal_of(factor, columns, first, width);
  HWY_DYNAMIC_DISPATCH(SparsegptScores)
  (weights, rows, columns, diagonal.data(), first, width, pruned, score);
}

void mark_at_most(const float* score, int64_t rows, int64_t columns, int64_t first, int64_t width,
                  float threshold, uint8_t* pruned) {
  HWY_DYNAMIC_DISPATCH(MarkColumnsAtMost)(score, rows, columns, first, width, threshold, pruned);
}

void sparsegpt_block(float* weights, int64_t rows, int64_t columns, const float* factor,
                     int64_t first, int64_t width, const Pattern& pattern, uint8_t* pruned,
                     float* errors) {
  const std::vector<float> diagonal = diagonal_of(factor, columns, first, width);
  std::vector<float> idle(static_cast<size_t>(width));  // for the rows that a set of four lacks
  HWY_DYNAMIC_DISPATCH(SparsegptBlock)
  (weights, rows, columns, factor, diagonal.data(), first, width, pattern.keep, pattern.group,
   pruned, errors, idle.data());
}

void subtract_columns(float* weights, int64_t rows, int64_t columns, int64_t first, int64_t width,
                      const float* update) {
  HWY_DYNAMIC_DISPATCH(SubtractColumns)(weights, rows, columns, first, width, update);
}

}  // namespace espalier::prune
#endif  // HWY_ONCE
