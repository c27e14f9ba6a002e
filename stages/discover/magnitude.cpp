// The c largest |W|, ties to the lower index.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "stages/discover/largest.h"
#include "stages/discover/method.h"

namespace espalier::discover {
namespace {

class Magnitude : public Method {
 public:
  void check(const std::string&, int64_t, int64_t) const override {}
  double predicted_cost(int64_t rows, int64_t columns) const override {
    return double(rows) * double(columns);
  }
  IndexSet discover(const Matrix& matrix, int64_t cardinality) const override {
    const at::Tensor& weight = matrix.weight;
    IndexSet set;
    set.positions = largest_positions(
        {weight.const_data_ptr<float>(), static_cast<size_t>(weight.numel())}, cardinality, 0);
    if (static_cast<int64_t>(set.positions.size()) < cardinality)
      throw NumericalError(
          fmt::format("{}: has {} nonzero entries, and an index set of {} is asked for; lower "
                      "discover.cardinality or leave the matrix out of discover.targets",
                      matrix.name, set.positions.size(), cardinality));
    set.objective = squares_outside(weight, set.positions);
    return set;
  }
};

const MethodRegistration registration{
    "magnitude", [](const config::Section&) { return std::make_unique<Magnitude>(); }};

}  // namespace
}  // namespace espalier::discover
