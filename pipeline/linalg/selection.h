#pragma once
/// Exact order statistics over values that are spread over workers and ranks.

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"

namespace espalier::linalg {

/// One selection: non-negative finite float values in pieces (this rank's tiles).
struct Selection {
  std::vector<std::span<const float>> pieces;
  int64_t k = 0;  ///< 0-based position in ascending order, over all ranks
};

/// The value at position k of each selection, exactly: radix selection on the floats' bits with
/// histograms reduced over ranks (three rounds of 11, 11 and 9 bits; every selection of the batch
/// in the same three collectives). Collective. Reads the values three times.
std::vector<float> kth_smallest(const std::vector<Selection>& batch, Workers& workers,
                                const comm::Communicator& group);

/// Where exactly-k selections cut: a value goes when it is < threshold, or == threshold and its
/// global index is < first_kept_index (the largest int64 when all ties go). k = 0 gives a cut that
/// takes nothing.
struct Cut {
  float threshold = 0;
  int64_t first_kept_index = 0;
};

/// The cuts that take exactly each selection's k smallest, ties by ascending index. piece_index[i]
/// is the global index of pieces[i]'s first value (pieces are contiguous index ranges). Three
/// collectives for all selections, and two for each whose k-th value has ties on both sides.
std::vector<Cut> cut_smallest(const std::vector<Selection>& batch,
                              std::span<const std::vector<int64_t>> piece_index, Workers& workers,
                              const comm::Communicator& group);
/// The same of one selection.
Cut cut_smallest(const Selection& selection, std::span<const int64_t> piece_index, Workers& workers,
                 const comm::Communicator& group);

/// How many values of each part are among the floor(share * number) smallest of all parts and
/// ranks, exactly, ties to the lower part; for values too many to be held at once. They are given
/// kPasses times, in any order and spread over ranks in any way:
///
///   for (int pass = 0; pass < StreamedSelection::kPasses; ++pass) {
///     for (...) selection.add(part, values);
///     selection.finish_pass(group);
///   }
///
/// Memory and what travels in a pass: 2048 integers a part.
class StreamedSelection {
 public:
  static constexpr int kPasses = 3;
  StreamedSelection(int64_t parts, double share);
  /// Non-negative finite values of `part`; several workers may call it at once.
  void add(int64_t part, std::span<const float> values);
  /// Collective.
  void finish_pass(const comm::Communicator& group);
  /// Of every part, behind the last pass. With cut_smallest each part then loses its share.
  std::vector<int64_t> counts() const;
  /// Of all parts and ranks, behind the first pass.
  int64_t values() const { return values_; }

 private:
  double share_;
  int pass_ = 0;
  int32_t prefix_ = 0;                 // leading bits of the largest value that goes
  int64_t values_ = 0, k_ = 0;         // k_: its position among those that have them
  std::vector<int64_t> bins_, below_;  // [parts, bins] of this pass; [parts] that surely go
  std::vector<int64_t> ties_;          // [parts], behind the last pass
  std::mutex mutex_;
};

}  // namespace espalier::linalg
