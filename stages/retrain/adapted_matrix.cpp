#include "stages/retrain/adapted_matrix.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"

namespace espalier::retrain {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// y = x (adapted matrix)^T, differentiable in x and in the matrix's parameters.
struct AdaptedLinear : torch::autograd::Function<AdaptedLinear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            at::TensorList parameters, const AdaptedMatrix* matrix,
                            const UnitKey& key) {
    (void)parameters;  // inputs only so that autograd asks for their gradients
    Saved saved;
    at::Tensor y = matrix->forward(x, key, saved);
    context->save_for_backward(saved);
    auto& data = context->saved_data;
    data["matrix"] = reinterpret_cast<int64_t>(matrix);
    data["seed"] = static_cast<int64_t>(key.seed);
    data["step"] = key.step;
    data["first_sequence"] = key.first_sequence;
    data["sequences"] = key.sequences;
    data["evaluating"] = key.evaluating;
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto& data = context->saved_data;
    const auto* matrix = reinterpret_cast<const AdaptedMatrix*>(data["matrix"].toInt());
    const UnitKey key{static_cast<uint64_t>(data["seed"].toInt()), data["step"].toInt(),
                      data["first_sequence"].toInt(), data["sequences"].toInt(),
                      data["evaluating"].toBool()};
    AdaptedMatrix::Gradients own =
        matrix->backward(gradients[0].contiguous(), context->get_saved_variables(), key,
                         context->needs_input_grad(0));
    variable_list out = {own.x};
    for (at::Tensor& gradient : own.parameters) out.push_back(std::move(gradient));
    out.resize(out.size() + 2);  // matrix and key
    return out;
  }
};

class MatrixAdapter : public Adapter {
 public:
  explicit MatrixAdapter(std::vector<std::unique_ptr<AdaptedMatrix>> matrices)
      : matrices_(std::move(matrices)), leaves_(matrices_.size()) {
    int64_t first = 0;
    for (const auto& matrix : matrices_) {
      first_parameter_.push_back(first);
      first += static_cast<int64_t>(matrix->initial(0).size());
    }
    first_parameter_.push_back(first);
  }

  std::vector<train::Parameter> initial_parameters(uint64_t seed) const override {
    std::vector<train::Parameter> all;
    for (const auto& matrix : matrices_)
      for (train::Parameter& parameter : matrix->initial(seed)) all.push_back(std::move(parameter));
    return all;
  }

  void bind(const train::ParameterSet& parameters) override {
    for (size_t m = 0; m < matrices_.size(); ++m) {
      leaves_[m].clear();
      std::vector<at::Tensor> values;
      for (const int64_t p : parameters_of(static_cast<int64_t>(m))) {
        leaves_[m].push_back(parameters.parameters()[p].value);
        values.push_back(leaves_[m].back().detach());
      }
      matrices_[m]->bind(std::move(values));
    }
  }

  void prepare_step(Workers& workers) override {
    workers.for_each(static_cast<int64_t>(matrices_.size()), [&](int64_t m, int) {
      const at::NoGradGuard no_grad;
      matrices_[m]->prepare();
    });
  }

  at::Tensor apply(int64_t target, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                   const UnitKey& key) const override {
    const at::TensorList leaves = leaves_[target];
    const AdaptedMatrix* matrix = matrices_[target].get();
    const at::Tensor y = AdaptedLinear::apply(x, leaves, matrix, key);
    return bias ? at::add(y, *bias) : y;
  }

  std::vector<int64_t> parameters_of(int64_t target) const override {
    std::vector<int64_t> parameters;
    for (int64_t p = first_parameter_[target]; p < first_parameter_[target + 1]; ++p)
      parameters.push_back(p);
    return parameters;
  }

  at::Tensor merged(int64_t target) const override {
    const at::NoGradGuard no_grad;
    return matrices_[target]->merged();
  }
  std::optional<model::AddedTerms> beside(int64_t target) const override {
    return matrices_[target]->beside();
  }
  std::vector<double> map_distances(int64_t target) const override {
    const at::NoGradGuard no_grad;
    return matrices_[target]->map_distances();
  }
  NamedTensors frozen_tensors() const override {
    NamedTensors all;
    for (const auto& matrix : matrices_)
      for (auto& tensor : matrix->frozen()) all.push_back(std::move(tensor));
    return all;
  }

 private:
  std::vector<std::unique_ptr<AdaptedMatrix>> matrices_;
  std::vector<std::vector<at::Tensor>> leaves_;  // by matrix: the trained tensors themselves
  std::vector<int64_t> first_parameter_;         // by matrix, and one past the last
};

template <class T>
void write_sum(const T* weight, const float* added, const uint8_t* kept, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = (weight ? static_cast<float>(weight[i]) : 0.0f) + added[i];
    out[i] = static_cast<T>(kept && !kept[i] ? 0.0f : value);
  }
}

}  // namespace

std::unique_ptr<Adapter> make_matrix_adapter(std::vector<std::unique_ptr<AdaptedMatrix>> matrices) {
  return std::make_unique<MatrixAdapter>(std::move(matrices));
}

std::unique_ptr<Adapter> MatrixMethod::attach(std::vector<Target> targets,
                                              const AttachOptions& options) const {
  std::vector<std::unique_ptr<AdaptedMatrix>> matrices;
  for (Target& target : targets) {
    check(target.name, target.weight.size(0), target.weight.size(1));
    matrices.push_back(make(std::move(target), options));
  }
  return make_matrix_adapter(std::move(matrices));
}

void check_rank(const std::string& matrix, int64_t rows, int64_t columns, int64_t rank) {
  if (rank > std::min(rows, columns))
    throw UserError(
        fmt::format("{} [{}, {}]: retrain.adapter_rank = {} is more than its rank can be, {}",
                    matrix, rows, columns, rank, std::min(rows, columns)));
}

const at::Tensor* frozen_tensor(const AttachOptions& options, const std::string& name,
                                at::ScalarType type, at::IntArrayRef shape) {
  if (options.frozen.empty()) return nullptr;
  const auto found = options.frozen.find(name);
  if (found == options.frozen.end())
    throw UserError(
        fmt::format("the adapter that retraining starts from has no tensor '{}'; it "
                    "was made with other retrain settings",
                    name));
  const at::Tensor& tensor = found->second;
  if (tensor.scalar_type() != type || tensor.sizes() != shape)
    throw UserError(fmt::format(
        "the adapter that retraining starts from has {} of {} [{}], but {} [{}] is needed", name,
        c10::toString(tensor.scalar_type()), fmt::join(tensor.sizes(), ", "), c10::toString(type),
        fmt::join(shape, ", ")));
  return &tensor;
}

at::Tensor sum_inside(const at::Tensor& weight, const at::Tensor& added, const at::Tensor& kept,
                      bool with_weight) {
  at::Tensor out = at::empty_like(weight);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, weight.scalar_type(), "sum_inside", [&] {
    write_sum(with_weight ? weight.const_data_ptr<scalar_t>() : nullptr,
              added.const_data_ptr<float>(),
              kept.defined() ? kept.const_data_ptr<uint8_t>() : nullptr, weight.numel(),
              out.data_ptr<scalar_t>());
  });
  return out;
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& kept) {
  at::Tensor g = linalg::product(dy.t(), x, at::kFloat);
  if (!kept.defined()) return g;
  float* values = g.data_ptr<float>();
  const uint8_t* keep = kept.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < g.numel(); ++i) values[i] = keep[i] ? values[i] : 0.0f;
  return g;
}

}  // namespace espalier::retrain
