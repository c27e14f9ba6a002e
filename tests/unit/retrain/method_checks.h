#pragma once
/// A retraining method held against its formula, written as plain float64 loops: the matrix it acts
/// as, its outputs, its gradients by finite differences of those loops, its merge.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"
#include "stages/retrain/adapter.h"
#include "stages/retrain/dropout.h"
#include "tests/unit/retrain/configured_method.h"

namespace espalier::retrain {

/// A matrix or a vector in float64, rows after rows.
struct Plain {
  int64_t rows = 0, columns = 0;
  std::vector<double> values;

  Plain() = default;
  Plain(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), values(static_cast<size_t>(rows * columns), 0.0) {}
  explicit Plain(const at::Tensor& tensor)
      : Plain(tensor.dim() > 1 ? tensor.size(0) : 1,
              tensor.dim() > 1 ? tensor.numel() / tensor.size(0) : tensor.numel()) {
    const at::Tensor wide = tensor.detach().to(at::kDouble).contiguous();
    values.assign(wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel());
  }
  double& at(int64_t i, int64_t j) { return values[static_cast<size_t>(i * columns + j)]; }
  double at(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * columns + j)]; }
};

inline Plain times(const Plain& a, const Plain& b) {
  Plain c(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.columns; ++k)
      for (int64_t j = 0; j < b.columns; ++j) c.at(i, j) += a.at(i, k) * b.at(k, j);
  return c;
}

inline Plain turned_around(const Plain& a) {
  Plain t(a.columns, a.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.columns; ++j) t.at(j, i) = a.at(i, j);
  return t;
}

/// What a formula may read beside W and the parameters: the adapter's frozen tensors.
using Frozen = std::map<std::string, at::Tensor>;
/// The matrix that a method makes of W, without any mask.
using Formula =
    std::function<Plain(const Plain& w, const std::vector<Plain>& parameters, const Frozen&)>;

struct MethodCase {
  std::vector<std::string> overrides;  ///< "retrain=lora", "retrain.adapter_rank=3"
  Formula formula;
  bool dropout_of_everything = false;  ///< dropout acts on all of x, not on the added terms' alone
  std::string name = "model.layers.0.mlp.up_proj.weight";
  int64_t rows = 12, columns = 8;
  model::Role role = model::kUp;
};

/// The method at one random matrix, its parameters moved away from the start.
class MethodAtWork {
 public:
  struct Setting {
    at::ScalarType type = at::kFloat;
    bool masked = false;
    double dropout = 0;
  };
  static constexpr int64_t kTokens = 6;
  const UnitKey key{7, 3, 0, 2};

  MethodAtWork(const MethodCase& c, const Setting& setting) : case_(c), setting_(setting) {
    std::vector<std::string> overrides = c.overrides;
    overrides.push_back("retrain.dropout=" + std::to_string(setting.dropout));
    method = configured(overrides);
    at::manual_seed(1);
    target.name = c.name;
    target.role = c.role;
    target.weight = at::randn({c.rows, c.columns}).to(setting.type);
    x = at::randn({kTokens, c.columns}).to(setting.type);
    dy = at::randn({kTokens, c.rows}).to(setting.type);
    if (setting.masked) {
      target.weight.mul_(at::rand({c.rows, c.columns}).gt(0.5));
      target.kept = target.weight.ne(0).to(at::kByte);
    }
    AttachOptions options;
    options.merge = setting.masked ? Merge::masked : Merge::dense;
    options.seed = 5;
    adapter = method->attach({target}, options);
    for (const auto& [name, tensor] : adapter->frozen_tensors()) frozen_[name] = tensor;
    parameters = std::make_unique<train::ParameterSet>(adapter->initial_parameters(5));
    adapter->bind(*parameters);
    prepare();
  }

  void move_away(double by = 0.3) {
    for (size_t i = 0; i < parameters->flat().size(); ++i)
      parameters->flat()[i] += static_cast<float>(by * CounterRandom(2, "move").normal(i));
    prepare();
  }
  void prepare() {
    Workers workers(1);
    adapter->prepare_step(workers);
  }

  std::vector<Plain> plain_parameters() const {
    std::vector<Plain> all;
    for (const train::Parameter& p : parameters->parameters()) all.emplace_back(p.value);
    return all;
  }
  /// The formula's matrix, inside the mask where there is one.
  Plain matrix(const std::vector<Plain>& values) const {
    Plain changed = case_.formula(Plain(target.weight), values, frozen_);
    if (setting_.masked) {
      const Plain kept(target.kept);
      for (size_t i = 0; i < kept.values.size(); ++i) changed.values[i] *= kept.values[i];
    }
    return changed;
  }
  /// y of the formula: the dropped part of x meets what was added, or all of the matrix.
  Plain outputs(const Plain& input, const std::vector<Plain>& values) const {
    const Plain changed = matrix(values), w(target.weight);
    const Plain factor(setting_.dropout > 0 ? dropout(at::ones({kTokens, case_.columns}),
                                                      setting_.dropout, key, target.name)
                                            : at::ones({kTokens, case_.columns}));
    Plain y(kTokens, case_.rows);
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t i = 0; i < case_.rows; ++i)
        for (int64_t j = 0; j < case_.columns; ++j) {
          const double dropped = input.at(t, j) * factor.at(t, j);
          y.at(t, i) += case_.dropout_of_everything ? dropped * changed.at(i, j)
                                                    : input.at(t, j) * w.at(i, j) +
                                                          dropped * (changed.at(i, j) - w.at(i, j));
        }
    return y;
  }

  MethodCase case_;
  Setting setting_;
  std::unique_ptr<AdapterMethod> method;
  Target target;
  at::Tensor x, dy;
  std::unique_ptr<Adapter> adapter;
  std::unique_ptr<train::ParameterSet> parameters;
  Frozen frozen_;
};

/// |ours - theirs| / |theirs|.
inline double distance(const at::Tensor& ours, const std::vector<double>& theirs) {
  const at::Tensor a = ours.detach().to(at::kDouble).contiguous().view(-1);
  const at::Tensor b = at::tensor(theirs, at::kDouble);
  return ((a - b).norm() / b.norm()).item<double>();
}

/// The derivative of sum(y * dy) by each of `at`, which `loss` reads: central differences.
inline std::vector<double> differences(std::vector<double>& at,
                                       const std::function<double()>& loss) {
  constexpr double kStep = 1e-5;
  std::vector<double> gradient;
  for (double& value : at) {
    const double here = value;
    value = here + kStep;
    const double above = loss();
    value = here - kStep;
    const double below = loss();
    value = here;
    gradient.push_back((above - below) / (2 * kStep));
  }
  return gradient;
}

inline void expect_follows_formula(const MethodCase& c, const MethodAtWork::Setting& setting) {
  SCOPED_TRACE(testing::Message() << c.overrides.front() << " type " << c10::toString(setting.type)
                                  << " masked " << setting.masked << " dropout "
                                  << setting.dropout);
  MethodAtWork at_work(c, setting);
  at_work.move_away();
  const double tolerance = setting.type == at::kFloat ? 1e-5 : 3e-2;

  const at::Tensor x = at_work.x.clone().set_requires_grad(true);
  const at::Tensor y = at_work.adapter->apply(0, x, {}, at_work.key);
  EXPECT_EQ(y.scalar_type(), setting.type);
  std::vector<at::Tensor> inputs = {x};
  for (const int64_t p : at_work.adapter->parameters_of(0))
    inputs.push_back(at_work.parameters->parameters()[p].value);
  const auto ours = torch::autograd::grad({y}, inputs, {at_work.dy});

  std::vector<Plain> values = at_work.plain_parameters();
  Plain input(at_work.x);
  const Plain dy(at_work.dy);
  const auto loss = [&] {
    const Plain out = at_work.outputs(input, values);
    double sum = 0;
    for (size_t i = 0; i < out.values.size(); ++i) sum += out.values[i] * dy.values[i];
    return sum;
  };
  EXPECT_LT(distance(y, at_work.outputs(input, values).values), tolerance);
  EXPECT_LT(distance(ours[0], differences(input.values, loss)), tolerance);
  for (size_t p = 0; p < values.size(); ++p)
    EXPECT_LT(distance(ours[p + 1], differences(values[p].values, loss)), tolerance)
        << at_work.parameters->parameters()[p].name;

  const at::Tensor merged = at_work.adapter->merged(0);
  EXPECT_EQ(merged.scalar_type(), setting.type);
  EXPECT_LT(distance(merged, at_work.matrix(values).values),
            setting.type == at::kFloat ? 1e-6 : 4e-3);
  if (setting.masked) {
    EXPECT_EQ(merged.ne(0).logical_and(at_work.target.weight.eq(0)).sum().item<int64_t>(), 0);
  }
}

/// Forward, gradients and merge in both types, with and without a mask and dropout.
inline void expect_follows_formula(const MethodCase& c) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const bool masked : {false, true})
      for (const double dropout : {0.0, 0.3}) expect_follows_formula(c, {type, masked, dropout});
}

/// At the start nothing changes, to the bit.
inline void expect_identity_at_start(const MethodCase& c) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const bool masked : {false, true}) {
      const MethodAtWork at_work(c, {type, masked, 0});
      EXPECT_TRUE(at::equal(at_work.adapter->merged(0), at_work.target.weight));
      EXPECT_TRUE(at::equal(at_work.adapter->apply(0, at_work.x, {}, at_work.key),
                            linalg::linear(at_work.x, at_work.target.weight)));
    }
}

/// The method trains `count` numbers at [12, 8], and says so.
inline void expect_parameters(const MethodCase& c, int64_t count) {
  const MethodAtWork at_work(c, {});
  EXPECT_EQ(at_work.parameters->size(), count);
  EXPECT_EQ(at_work.method->trainable_parameters(c.rows, c.columns), count);
}

/// Both what `make` throws and that it is a UserError; "accepted" when it does not throw.
inline std::string refusal_of(const std::function<void()>& make) {
  try {
    make();
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

inline void expect_refused(std::vector<std::string> overrides,
                           const std::vector<std::string>& parts) {
  const std::string text = refusal_of([&] { configured(overrides); });
  for (const std::string& part : parts) EXPECT_NE(text.find(part), std::string::npos) << text;
}

inline void expect_shape_refused(std::vector<std::string> overrides, int64_t rows, int64_t columns,
                                 const std::vector<std::string>& parts) {
  const auto method = configured(std::move(overrides));
  const std::string text = refusal_of([&] { method->check("block.some.weight", rows, columns); });
  EXPECT_NE(text.find("block.some.weight"), std::string::npos) << text;
  for (const std::string& part : parts) EXPECT_NE(text.find(part), std::string::npos) << text;
}

}  // namespace espalier::retrain
