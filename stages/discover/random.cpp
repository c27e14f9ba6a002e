// c positions, each set of c equally likely: counter-based draws keyed by the seed and the name.
#include "pipeline/random.h"

#include <algorithm>
#include <unordered_set>

#include "stages/discover/method.h"

namespace espalier::discover {
namespace {

class Random : public Method {
 public:
  void check(const std::string&, int64_t, int64_t) const override {}
  double predicted_cost(int64_t rows, int64_t columns) const override {
    return double(rows) * double(columns);
  }
  /// Floyd's sampling without replacement (Bentley & Floyd, CACM 1987): one draw a position.
  IndexSet discover(const Matrix& matrix, int64_t cardinality) const override {
    const CounterRandom random(matrix.seed, "discover.random", stream_of(matrix.name));
    const int64_t elements = matrix.weight.numel();
    std::unordered_set<int64_t> chosen;
    for (int64_t last = elements - cardinality; last < elements; ++last) {
      const auto drawn = static_cast<int64_t>(random.below(last, last + 1));
      if (!chosen.insert(drawn).second) chosen.insert(last);
    }
    IndexSet set;
    set.positions.assign(chosen.begin(), chosen.end());
    std::sort(set.positions.begin(), set.positions.end());
    set.objective = squares_outside(matrix.weight, set.positions);
    return set;
  }
};

const MethodRegistration registration{
    "random", [](const config::Section&) { return std::make_unique<Random>(); }};

}  // namespace
}  // namespace espalier::discover
