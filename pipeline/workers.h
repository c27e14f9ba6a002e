#pragma once
/// The threads of one rank as workers on units.
///
/// A unit (a calibration sequence, a micro-batch, a tile of rows) has a fixed shape and runs on one
/// worker with one library thread, so that its bits do not depend on how many workers there are.
/// Which worker takes which unit is not fixed: combine results by exact sums or by unit index only.

#include <cstdint>
#include <functional>
#include <memory>

namespace espalier {

class Workers {
 public:
  /// `count` workers, the calling thread among them. `on_start` runs once on each new thread and
  /// once on the caller (it sets the libraries to one thread).
  explicit Workers(int count, std::function<void()> on_start = {});
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int count() const;

  /// Runs body(index, worker) for index 0..n-1, each once, in ascending order of start; returns
  /// when all are done. The first exception is thrown again here after the others have finished.
  /// Not reentrant.
  void for_each(int64_t n, const std::function<void(int64_t index, int worker)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace espalier
