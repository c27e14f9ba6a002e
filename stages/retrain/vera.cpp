/// VeRA (arXiv 2310.11454): dW = diag(b) B diag(d) A, with A [r, in] and B [out, r] random, frozen
/// and shared by all matrices: drawn once for the widest and cut to each. b = 0 and d = 0.1 at the
/// start; r + out trainable numbers a matrix.

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "stages/retrain/added.h"
#include "stages/retrain/start_values.h"

namespace espalier::retrain {

namespace {

constexpr const char* kA = "vera/A";
constexpr const char* kB = "vera/B";

struct VeraOptions {
  int64_t rank = 256;
  double d_initial = 0.1;
  AddedOptions added;
};

class VeraMatrix : public AddedMatrix {
 public:
  /// `stored`: the shared matrices whole, with one of the targets.
  VeraMatrix(Target target, const VeraOptions& options, const at::Tensor& a, const at::Tensor& b,
             NamedTensors stored)
      : AddedMatrix(std::move(target), options.added),
        rank_(options.rank),
        d_initial_(options.d_initial),
        a_(a.narrow(1, 0, columns())),
        b_(b.narrow(0, 0, rows())),
        stored_(std::move(stored)) {}

  std::vector<train::Parameter> initial(uint64_t) const override {
    const std::string& name = target().name;
    return {{name + "/d", at::full({rank_}, d_initial_, at::kFloat), 1.0},
            {name + "/b", at::zeros({rows()}, at::kFloat), 1.0}};
  }
  NamedTensors frozen() const override { return stored_; }

 protected:
  Terms terms() const override {
    return {values()[0].unsqueeze(1) * a_, values()[1].unsqueeze(1) * b_, {}};
  }
  std::vector<at::Tensor> pull_back(const Terms& gradient) const override {
    return {(gradient.down * a_).sum(1), (gradient.up * b_).sum(1)};
  }

 private:
  int64_t rank_;
  double d_initial_;
  at::Tensor a_, b_;
  NamedTensors stored_;
};

/// Uniform with variance 2 / fan_in (He et al., 2015).
at::Tensor kaiming(uint64_t seed, const char* purpose, int64_t rows, int64_t fan_in) {
  return uniform_start(seed, purpose, "", {rows, fan_in},
                       std::sqrt(6.0 / static_cast<double>(fan_in)));
}

class VeraMethod : public AdapterMethod {
 public:
  explicit VeraMethod(const VeraOptions& options) : options_(options) {}

  void check(const std::string&, int64_t, int64_t) const override {}  // any shape and rank
  nlohmann::json settings() const override { return {{"adapter_rank", options_.rank}}; }
  int64_t trainable_parameters(int64_t rows, int64_t) const override {
    return options_.rank + rows;
  }
  bool additive() const override { return true; }

  std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                  const AttachOptions& options) const override {
    int64_t rows = 0, columns = 0;
    for (const Target& target : targets) {
      rows = std::max(rows, target.weight.size(0));
      columns = std::max(columns, target.weight.size(1));
    }
    const int64_t rank = options_.rank;
    const at::Tensor* stored_a = frozen_tensor(options, kA, at::kFloat, {rank, columns});
    const at::Tensor* stored_b = frozen_tensor(options, kB, at::kFloat, {rows, rank});
    const at::Tensor a = stored_a ? *stored_a : kaiming(options.seed, kA, rank, columns);
    const at::Tensor b = stored_b ? *stored_b : kaiming(options.seed, kB, rows, rank);
    NamedTensors shared = {{kA, a}, {kB, b}};
    std::vector<std::unique_ptr<AdaptedMatrix>> matrices;
    for (Target& target : targets)
      matrices.push_back(std::make_unique<VeraMatrix>(std::move(target), options_, a, b,
                                                      std::exchange(shared, {})));
    return make_matrix_adapter(std::move(matrices));
  }

 private:
  VeraOptions options_;
};

std::unique_ptr<AdapterMethod> read_vera(const config::Section& section) {
  VeraOptions options;
  options.rank = section.integer_or("adapter_rank", options.rank, {.low = 1});
  options.d_initial = section.number_or("d_initial", options.d_initial);
  options.added.dropout = section.number_or("dropout", 0, {.low = 0, .high = 1, .high_open = true});
  return std::make_unique<VeraMethod>(options);
}

const AdapterRegistration registration{"vera", read_vera, {"adapter_rank", "d_initial", "dropout"}};

}  // namespace

}  // namespace espalier::retrain
