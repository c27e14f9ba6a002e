#include "pipeline/linalg/selection.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "pipeline/errors.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "pipeline/linalg/selection.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace espalier::linalg {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Appends the bits whose part above `shift` is `prefix`; `out` has room for one more vector.
int64_t CompressMatching(const float* values, int64_t n, int32_t prefix, int shift, int32_t* out) {
  const hn::ScalableTag<float> df;
  const hn::ScalableTag<int32_t> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto wanted = hn::Set(d, prefix);
  int64_t j = 0, count = 0;
  for (; j + lanes <= n; j += lanes) {
    const auto bits = hn::BitCast(d, hn::LoadU(df, values + j));
    const auto matches = hn::Eq(hn::ShiftRightSame(bits, shift), wanted);
    count += static_cast<int64_t>(hn::CompressStore(bits, matches, d, out + count));
  }
  for (; j < n; ++j) {
    const int32_t bits = std::bit_cast<int32_t>(values[j]);
    if (bits >> shift == prefix) out[count++] = bits;
  }
  return count;
}

}  // namespace HWY_NAMESPACE
}  // namespace espalier::linalg
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace espalier::linalg {
namespace {

HWY_EXPORT(CompressMatching);

constexpr int64_t kMostLanes = 64;  // of any vector that Highway knows, for CompressStore
constexpr int64_t kChunk = 16384;   // values compressed at a time: stays in cache
constexpr std::array<int, 3> kShift = {20, 9, 0};  // 11, 11 and 9 bits; the sign bit is 0
constexpr std::array<int, 3> kBits = {11, 11, 9};
constexpr int64_t kMostBins = 2048;

// Where a selection stands: the leading bits found, its position among the values that have them,
// and how many have them.
struct Search {
  int32_t prefix = 0;
  int64_t k = 0, matching = 0;
};

struct Item {
  int64_t selection;
  std::span<const float> values;
};

// Adds the round's histogram of one piece; four tables, so that runs of equal values do not wait
// for one counter.
void add_first_histogram(std::span<const float> values, int64_t* bins) {
  uint32_t tables[4][kMostBins] = {};
  size_t i = 0;
  const auto bin = [&](size_t j) { return std::bit_cast<uint32_t>(values[j]) >> kShift[0]; };
  for (; i + 4 <= values.size(); i += 4)
    for (size_t t = 0; t < 4; ++t) ++tables[t][bin(i + t) & (kMostBins - 1)];
  for (; i < values.size(); ++i) ++tables[0][bin(i) & (kMostBins - 1)];
  for (int64_t b = 0; b < kMostBins; ++b)
    bins[b] += int64_t{tables[0][b]} + tables[1][b] + tables[2][b] + tables[3][b];
}

void add_later_histogram(std::span<const float> values, int round, int32_t prefix, int64_t* bins) {
  std::vector<int32_t> matching(kChunk + kMostLanes);
  const int32_t mask = (1 << kBits[round]) - 1;
  for (size_t first = 0; first < values.size(); first += kChunk) {
    const auto chunk = values.subspan(first, std::min<size_t>(kChunk, values.size() - first));
    const int64_t count =
        HWY_DYNAMIC_DISPATCH(CompressMatching)(chunk.data(), static_cast<int64_t>(chunk.size()),
                                               prefix, kShift[round - 1], matching.data());
    for (int64_t i = 0; i < count; ++i) ++bins[(matching[i] >> kShift[round]) & mask];
  }
}

// Histograms [selections, bins] of the round, summed over workers and ranks.
std::vector<int64_t> histograms(const std::vector<Item>& items, const std::vector<Search>& searches,
                                int round, Workers& workers, const comm::Communicator& group) {
  const int64_t bins = int64_t{1} << kBits[round];
  const int64_t size = static_cast<int64_t>(searches.size()) * bins;
  std::vector<std::vector<int64_t>> parts(workers.count());
  workers.for_each(static_cast<int64_t>(items.size()), [&](int64_t i, int worker) {
    auto& part = parts[worker];
    part.resize(size);
    int64_t* table = part.data() + items[i].selection * bins;
    if (round == 0)
      add_first_histogram(items[i].values, table);
    else
      add_later_histogram(items[i].values, round, searches[items[i].selection].prefix, table);
  });
  std::vector<int64_t> sum(size);
  for (const auto& part : parts)
    for (size_t i = 0; i < part.size(); ++i) sum[i] += part[i];
  group.all_reduce_sum(sum);
  return sum;
}

void descend(Search& search, const int64_t* bins, int round, int64_t selection, int64_t k) {
  int64_t bin = 0;
  const int64_t count = int64_t{1} << kBits[round];
  for (; bin < count && search.k >= bins[bin]; ++bin) search.k -= bins[bin];
  if (bin == count || search.k < 0)
    throw DefectError(
        fmt::format("selection {} asks for position {}, which is outside its values over all ranks",
                    selection, k));
  search.prefix = (search.prefix << kBits[round]) | static_cast<int32_t>(bin);
  search.matching = bins[bin];
}

// The value of each selection, and its position among the values equal to it.
std::vector<Search> find(const std::vector<Selection>& batch, Workers& workers,
                         const comm::Communicator& group) {
  std::vector<Item> items;
  std::vector<Search> searches(batch.size());
  for (size_t s = 0; s < batch.size(); ++s) {
    searches[s].k = batch[s].k;
    for (const auto& piece : batch[s].pieces) items.push_back({static_cast<int64_t>(s), piece});
  }
  for (int round = 0; round < 3; ++round) {
    const auto bins = histograms(items, searches, round, workers, group);
    for (size_t s = 0; s < batch.size(); ++s)
      descend(searches[s], bins.data() + (s << kBits[round]), round, static_cast<int64_t>(s),
              batch[s].k);
  }
  return searches;
}

struct PieceTies {
  int64_t first_index, ties;
};

// The global index of the tie at position `place` (0-based, ascending index) among all values equal
// to `threshold`: pieces are ordered by index, and the rank that holds the right one looks inside.
int64_t index_of_tie(const Selection& selection, std::span<const int64_t> piece_index,
                     float threshold, int64_t place, const comm::Communicator& group) {
  std::vector<PieceTies> mine;
  for (size_t i = 0; i < selection.pieces.size(); ++i) {
    const auto& piece = selection.pieces[i];
    mine.push_back({piece_index[i], std::count(piece.begin(), piece.end(), threshold)});
  }
  const auto gathered = group.all_gather(std::as_bytes(std::span(mine)));
  std::vector<PieceTies> all;
  for (const auto& bytes : gathered) {
    const size_t old = all.size();
    all.resize(old + bytes.size() / sizeof(PieceTies));
    if (!bytes.empty()) std::memcpy(all.data() + old, bytes.data(), bytes.size());
  }
  std::sort(all.begin(), all.end(),
            [](const PieceTies& a, const PieceTies& b) { return a.first_index < b.first_index; });
  size_t holder = 0;
  for (; place >= all[holder].ties; ++holder) place -= all[holder].ties;
  int64_t found[1] = {-1};
  for (size_t i = 0; i < selection.pieces.size(); ++i) {
    const auto& piece = selection.pieces[i];
    // An empty piece may share its first index with the holder.
    if (piece_index[i] != all[holder].first_index || mine[i].ties == 0) continue;
    size_t at = 0;
    for (int64_t left = place;; ++at)
      if (piece[at] == threshold && left-- == 0) break;
    found[0] = piece_index[i] + static_cast<int64_t>(at);
  }
  group.all_reduce_max(std::span<int64_t>(found));
  return found[0];
}

}  // namespace

std::vector<float> kth_smallest(const std::vector<Selection>& batch, Workers& workers,
                                const comm::Communicator& group) {
  std::vector<float> values;
  for (const Search& search : find(batch, workers, group))
    values.push_back(std::bit_cast<float>(search.prefix));
  return values;
}

std::vector<Cut> cut_smallest(const std::vector<Selection>& batch,
                              std::span<const std::vector<int64_t>> piece_index, Workers& workers,
                              const comm::Communicator& group) {
  std::vector<Cut> cuts(batch.size());
  std::vector<Selection> last;  // of each the largest value that goes
  std::vector<size_t> of;
  for (size_t s = 0; s < batch.size(); ++s) {
    if (batch[s].k == 0) continue;
    last.push_back({batch[s].pieces, batch[s].k - 1});
    of.push_back(s);
  }
  if (last.empty()) return cuts;
  const std::vector<Search> searches = find(last, workers, group);
  for (size_t i = 0; i < of.size(); ++i) {
    const Search& search = searches[i];
    Cut& cut = cuts[of[i]];
    cut.threshold = std::bit_cast<float>(search.prefix);
    const bool all_ties_go = search.k + 1 == search.matching;
    cut.first_kept_index =
        all_ties_go
            ? std::numeric_limits<int64_t>::max()
            : index_of_tie(batch[of[i]], piece_index[of[i]], cut.threshold, search.k, group) + 1;
  }
  return cuts;
}

Cut cut_smallest(const Selection& selection, std::span<const int64_t> piece_index, Workers& workers,
                 const comm::Communicator& group) {
  const std::vector<int64_t> index(piece_index.begin(), piece_index.end());
  return cut_smallest({selection}, std::span(&index, 1), workers, group).front();
}

StreamedSelection::StreamedSelection(int64_t parts, double share)
    : share_(share), bins_(parts << kBits[0]), below_(parts), ties_(parts) {}

void StreamedSelection::add(int64_t part, std::span<const float> values) {
  if (pass_ > 0 && k_ < 0) return;  // nothing goes
  std::array<int64_t, kMostBins> table{};
  if (pass_ == 0)
    add_first_histogram(values, table.data());
  else
    add_later_histogram(values, pass_, prefix_, table.data());
  const int64_t bins = int64_t{1} << kBits[pass_];
  const std::lock_guard lock(mutex_);
  int64_t* sum = bins_.data() + part * bins;
  for (int64_t b = 0; b < bins; ++b) sum[b] += table[b];
}

void StreamedSelection::finish_pass(const comm::Communicator& group) {
  const int64_t bins = int64_t{1} << kBits[pass_];
  const auto parts = static_cast<int64_t>(below_.size());
  group.all_reduce_sum(bins_);
  std::vector<int64_t> total(bins);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t b = 0; b < bins; ++b) total[b] += bins_[part * bins + b];
  if (pass_ == 0) {
    for (const int64_t count : total) values_ += count;
    k_ = static_cast<int64_t>(std::floor(static_cast<double>(values_) * share_)) - 1;
  }
  if (k_ >= 0) {
    Search search{prefix_, k_};
    descend(search, total.data(), pass_, 0, k_);
    const int64_t bin = search.prefix & (bins - 1);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t* of_part = bins_.data() + part * bins;
      for (int64_t b = 0; b < bin; ++b) below_[part] += of_part[b];
      ties_[part] = of_part[bin];
    }
    prefix_ = search.prefix;
    k_ = search.k;
  }
  if (++pass_ < kPasses) bins_.assign(parts << kBits[pass_], 0);
}

std::vector<int64_t> StreamedSelection::counts() const {
  std::vector<int64_t> counts = below_;
  int64_t left = k_ + 1;  // ties that go
  for (size_t part = 0; part < counts.size(); ++part) {
    const int64_t taken = std::min(left, ties_[part]);
    counts[part] += taken;
    left -= taken;
  }
  return counts;
}

}  // namespace espalier::linalg
#endif  // HWY_ONCE
