#include "stages/discover/grebsmo.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/one_thread.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"
#include "stages/discover/largest.h"

namespace espalier::discover {
namespace {

using at::Tensor;

constexpr int64_t kPublishedRank = 496, kPublishedRows = 5;
constexpr int kStepsOfARank = 2;
/// The fast form reaches its rank in so many doublings.
constexpr int kDoublings = 6;
/// Standard deviation over mean magnitude of a normal variable.
constexpr double kNormalScale = 1.2533141373155003;
/// Residuals below this share of W's rms are rounding of the float32 products.
constexpr double kRounding = 4e-6;

struct Sums {
  double squares = 0, magnitudes = 0;
};

/// residual = weight - residual; sums over its entries.
Sums subtract_from(const float* weight, float* residual, int64_t count) {
  constexpr int64_t kPiece = 1024, kLanes = 16;
  Sums sums;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = std::min(begin + kPiece, count);
    float square[kLanes] = {}, magnitude[kLanes] = {};
    const auto take = [&](int64_t i, int64_t lane) {
      const float value = weight[i] - residual[i];
      residual[i] = value;
      square[lane] += value * value;
      magnitude[lane] += std::abs(value);
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) take(i + lane, lane);
    for (; i < end; ++i) take(i, 0);
    for (const float lane : square) sums.squares += double(lane);
    for (const float lane : magnitude) sums.magnitudes += double(lane);
  }
  return sums;
}

double squares(const Tensor& x) { return x.square().sum(at::kDouble).item<double>(); }

class Decomposition {
 public:
  Decomposition(const Matrix& matrix, int64_t cardinality, const GrebsmoOptions& options)
      : name_(matrix.name),
        weight_(matrix.weight),
        cardinality_(cardinality),
        options_(options),
        cap_(rank_cap(options, weight_.size(0), weight_.size(1))),
        random_(matrix.seed, "discover.grebsmo", stream_of(matrix.name)),
        energy_(squares(weight_)),
        without_outliers_(weight_.clone()),
        residual_(at::empty_like(weight_)) {
    if (energy_ == 0) fail_too_few(0);
  }

  IndexSet run() {
    options_.published ? grow_as_published() : grow_fast();
    choose();
    if (static_cast<int64_t>(support_.size()) < cardinality_) fail_too_few(support_.size());
    return {support_, v_.size(0), objective_, iterations_};
  }

 private:
  void grow_as_published() {
    v_ = signs(1, weight_.size(1));
    for (int64_t outer = 0;; ++outer) {
      without_outliers_.copy_(weight_);
      for (int step = 0; step < kStepsOfARank; ++step) {
        fit();
        const Tensor outlier = residual_.abs() > threshold();
        without_outliers_ = at::where(outlier, weight_ - residual_, weight_);
        unexplained_ = residual_.masked_fill(outlier, 0);
      }
      const int64_t rank = v_.size(0);
      if (rank == cap_ || outer + 1 == options_.outer_steps ||
          squares(unexplained_) <= options_.tolerance * options_.tolerance * energy_)
        return;
      const Tensor r = std::get<1>(at::linalg_qr(unexplained_, "r"));
      append(r.narrow(0, 0, std::min(kPublishedRows, cap_ - rank)));
    }
  }

  void grow_fast() {
    v_ = sketch(weight_, std::max<int64_t>(1, cap_ >> kDoublings));
    while (true) {
      for (int step = 0; step < kStepsOfARank; ++step) improve();
      const int64_t rank = v_.size(0);
      if (rank == cap_ || 2 * objective_ <= options_.tolerance * options_.tolerance * energy_)
        break;
      float* r = residual_.data_ptr<float>();
      for (const int64_t position : support_) r[position] = 0;  // what S explains
      append(sketch(residual_, std::min(rank, cap_ - rank)));
    }
    for (int64_t step = 0; step < options_.outer_steps; ++step) {
      const double before = objective_;
      improve();
      if (!(before - objective_ > options_.improvement * objective_)) return;
    }
  }

  /// One bilateral step of the fast form.
  void improve() {
    const float* w = weight_.const_data_ptr<float>();
    float* a = without_outliers_.data_ptr<float>();
    fit();
    for (const int64_t position : support_) a[position] = w[position];
    choose();
    const float* r = residual_.const_data_ptr<float>();
    for (const int64_t position : support_) a[position] = w[position] - r[position];
  }

  /// U and V from W - S, and the residual W - U V.
  void fit() {
    const Tensor u = std::get<0>(
        at::linalg_qr(linalg::product(without_outliers_, v_.t(), at::kFloat), "reduced"));
    v_ = linalg::product(u.t(), without_outliers_, at::kFloat);
    linalg::product_into(residual_, u, v_);
    sums_ = subtract_from(weight_.const_data_ptr<float>(), residual_.data_ptr<float>(),
                          weight_.numel());
    if (!std::isfinite(sums_.squares))
      throw NumericalError(fmt::format(
          "{}: step {} of GreBsmo gave NaN or Inf; the weights are too large for float32 squares",
          name_, iterations_ + 1));
    ++iterations_;
  }

  float threshold() const {
    const double entries = double(weight_.numel());
    return float(std::max(options_.threshold * kNormalScale * sums_.magnitudes / entries,
                          kRounding * std::sqrt(energy_ / entries)));
  }

  /// The support of S, and the objective with it.
  void choose() {
    const float* r = residual_.const_data_ptr<float>();
    support_ =
        largest_positions({r, static_cast<size_t>(residual_.numel())}, cardinality_, threshold());
    double explained = 0;
    for (const int64_t position : support_) explained += double(r[position]) * r[position];
    objective_ = std::max(0.0, sums_.squares - explained) / 2;
  }

  void append(const Tensor& rows) { v_ = at::cat({v_, rows}); }

  Tensor sketch(const Tensor& matrix, int64_t rows) {
    return linalg::product(signs(rows, matrix.size(0)), matrix, at::kFloat);
  }

  /// Random signs, float32 [rows, columns]; each call draws others.
  Tensor signs(int64_t rows, int64_t columns) {
    Tensor values = at::empty({rows, columns}, at::kFloat);
    float* out = values.data_ptr<float>();
    for (int64_t i = 0; i < values.numel(); i += 64) {
      const uint64_t bits = random_.bits(drawn_++);
      for (int64_t bit = 0; bit < std::min<int64_t>(64, values.numel() - i); ++bit)
        out[i + bit] = bits >> bit & 1 ? 1.0f : -1.0f;
    }
    return values;
  }

  [[noreturn]] void fail_too_few(size_t found) const {
    throw NumericalError(fmt::format(
        "{}: {} entries stand out of the part of rank {} by {} times the residual's scale, and an "
        "index set of {} is asked for; lower discover.cardinality, discover.rank or "
        "discover.threshold, or leave the matrix out of discover.targets",
        name_, found, v_.defined() ? v_.size(0) : 0, options_.threshold, cardinality_));
  }

  const std::string& name_;
  const Tensor& weight_;
  const int64_t cardinality_;
  const GrebsmoOptions& options_;
  const int64_t cap_;
  const CounterRandom random_;
  uint64_t drawn_ = 0;
  const double energy_;
  Tensor without_outliers_, residual_, unexplained_, v_;
  Sums sums_;
  double objective_ = 0;
  std::vector<int64_t> support_;
  int64_t iterations_ = 0;
};

}  // namespace

int64_t rank_cap(const GrebsmoOptions& options, int64_t rows, int64_t columns) {
  const int64_t smaller = std::min(rows, columns);
  return options.rank ? std::min(*options.rank, smaller - 1)
                      : std::min(kPublishedRank, (smaller - 1) / 2);
}

IndexSet grebsmo(const Matrix& matrix, int64_t cardinality, const GrebsmoOptions& options) {
  const linalg::OneThread one_thread;
  return Decomposition(matrix, cardinality, options).run();
}

namespace {

class Grebsmo : public Method {
 public:
  explicit Grebsmo(const config::Section& section) {
    options_.published = section.choice("form", {"fast", "published"}) == "published";
    options_.rank = section.optional_integer("rank", {.low = 1});
    options_.threshold = section.number_or("threshold", options_.threshold, {.low = 0});
    options_.tolerance = section.number_or("tolerance", options_.tolerance, {.low = 0});
    options_.improvement = section.number_or("improvement", options_.improvement,
                                             {.low = 0, .high = 1, .low_open = true});
    options_.outer_steps = section.integer_or("outer_steps", options_.outer_steps, {.low = 1});
  }
  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    if (rank_cap(options_, rows, columns) < 1)
      throw UserError(
          fmt::format("{}: is [{}, {}], too small for a low-rank part; leave it out of "
                      "discover.targets or use discover=magnitude",
                      matrix, rows, columns));
  }
  double predicted_cost(int64_t rows, int64_t columns) const override {
    return double(rows) * double(columns) * double(rank_cap(options_, rows, columns));
  }
  IndexSet discover(const Matrix& matrix, int64_t cardinality) const override {
    return grebsmo(matrix, cardinality, options_);
  }

 private:
  GrebsmoOptions options_;
};

const MethodRegistration registration{
    "grebsmo", [](const config::Section& section) { return std::make_unique<Grebsmo>(section); }};

}  // namespace
}  // namespace espalier::discover
