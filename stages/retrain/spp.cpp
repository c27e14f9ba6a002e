#include "stages/retrain/spp.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"
#include "stages/retrain/dropout.h"
#include "stages/retrain/spp_kernels.h"

namespace espalier::retrain {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// One adapted matrix: the frozen weights, its parameters and what a step derives from them.
struct Layer {
  Target target;
  const SppOptions* options;
  at::Tensor alpha, beta;  // float32 leaves; beta undefined in that ablation
  int64_t first_parameter = 0;
  at::Tensor effective;  // W_eff in the model's type; with dropout: s W'

  float scale() const { return options->residual ? static_cast<float>(options->scale) : 1.0f; }
  SppMatrix matrix() const {
    const at::Tensor& w = target.weight;
    return {w.const_data_ptr(),
            w.scalar_type() == at::kBFloat16,
            w.size(0),
            w.size(1),
            options->groups,
            alpha.const_data_ptr<float>(),
            beta.defined() ? beta.const_data_ptr<float>() : nullptr};
  }
  /// W * (base + s repeat(alpha) beta).
  void write_effective(float base, at::Tensor& out) const {
    spp_effective(matrix(), base, scale(), out.data_ptr());
  }
};

/// The gradients of alpha and beta from dy and the input that met s W'.
variable_list parameter_gradients(const Layer& layer, const at::Tensor& dy, const at::Tensor& x) {
  const at::Tensor g = linalg::product(dy.t(), x, at::kFloat);
  at::Tensor alpha_gradient =
      at::empty_like(layer.alpha, layer.alpha.options().requires_grad(false));
  at::Tensor beta_gradient;
  if (layer.beta.defined())
    beta_gradient = at::empty({layer.beta.numel()}, alpha_gradient.options());
  spp_reduce(layer.matrix(), g.const_data_ptr<float>(), layer.scale(),
             alpha_gradient.data_ptr<float>(),
             beta_gradient.defined() ? beta_gradient.data_ptr<float>() : nullptr);
  return {alpha_gradient, beta_gradient};
}

const Layer* layer_of(AutogradContext* context) {
  return reinterpret_cast<const Layer*>(context->saved_data["layer"].toInt());
}

/// y = x W_eff^T: one product.
struct SppLinear : torch::autograd::Function<SppLinear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& alpha,
                            const std::optional<at::Tensor>& beta, const Layer* layer) {
    (void)alpha, (void)beta;  // inputs only so that autograd asks for their gradients
    context->save_for_backward({x});
    context->saved_data["layer"] = reinterpret_cast<int64_t>(layer);
    return linalg::product(x, layer->effective.t(), x.scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const Layer& layer = *layer_of(context);
    const at::Tensor x = context->get_saved_variables()[0];
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx;
    if (context->needs_input_grad(0)) dx = linalg::product(dy, layer.effective, dy.scalar_type());
    const variable_list own = parameter_gradients(layer, dy, x);
    return {dx, own[0], own[1], at::Tensor()};
  }
};

/// y = x W^T + dropout(x) (s W')^T: the published form, W' formed once a step.
struct SppDropoutLinear : torch::autograd::Function<SppDropoutLinear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& alpha,
                            const std::optional<at::Tensor>& beta, const Layer* layer,
                            const UnitKey& key) {
    (void)alpha, (void)beta;
    const at::Tensor dropped = dropout(x, layer->options->dropout, key, layer->target.name);
    context->save_for_backward({dropped});
    auto& saved = context->saved_data;
    saved["layer"] = reinterpret_cast<int64_t>(layer);
    saved["seed"] = static_cast<int64_t>(key.seed);
    saved["step"] = key.step;
    saved["first_sequence"] = key.first_sequence;
    saved["sequences"] = key.sequences;
    const at::Tensor added = linalg::product(dropped, layer->effective.t(), x.scalar_type());
    if (!layer->options->residual) return added;
    return linalg::product(x, layer->target.weight.t(), x.scalar_type()).add_(added);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const Layer& layer = *layer_of(context);
    const at::Tensor dropped = context->get_saved_variables()[0];
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx;
    if (context->needs_input_grad(0)) {
      auto& saved = context->saved_data;
      const UnitKey key{static_cast<uint64_t>(saved["seed"].toInt()), saved["step"].toInt(),
                        saved["first_sequence"].toInt(), saved["sequences"].toInt()};
      dx = dropout(linalg::product(dy, layer.effective, dy.scalar_type()), layer.options->dropout,
                   key, layer.target.name);
      if (layer.options->residual)
        dx.add_(linalg::product(dy, layer.target.weight, dy.scalar_type()));
    }
    const variable_list own = parameter_gradients(layer, dy, dropped);
    return {dx, own[0], own[1], at::Tensor(), at::Tensor()};
  }
};

at::Tensor uniform(const std::string& name, const char* purpose, uint64_t seed,
                   at::IntArrayRef shape, double bound) {
  at::Tensor out = at::empty(shape, at::kFloat);
  const CounterRandom random(seed, purpose, stream_of(name));
  float* values = out.data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i)
    values[i] = static_cast<float>(random.uniform(static_cast<uint64_t>(i), -bound, bound));
  return out;
}

class Spp : public Adapter {
 public:
  Spp(const SppOptions& options, std::vector<Target> targets) : options_(options) {
    int64_t parameter = 0;
    for (Target& target : targets) {
      Layer layer{std::move(target), &options_, {}, {}, parameter, {}};
      layer.target.weight = layer.target.weight.contiguous();
      parameter += options_.beta ? 2 : 1;
      layers_.push_back(std::move(layer));
    }
  }
  Spp(const Spp&) = delete;
  Spp& operator=(const Spp&) = delete;

  std::vector<train::Parameter> initial_parameters(uint64_t seed) const override;
  void bind(const train::ParameterSet& parameters) override;
  void prepare_step(Workers& workers) override;
  at::Tensor apply(int64_t target, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                   const UnitKey& key) const override;
  std::vector<int64_t> parameters_of(int64_t target) const override;
  at::Tensor merged(int64_t target) const override;

 private:
  SppOptions options_;
  std::vector<Layer> layers_;
};

std::vector<train::Parameter> Spp::initial_parameters(uint64_t seed) const {
  std::vector<train::Parameter> parameters;
  for (const Layer& layer : layers_) {
    const int64_t rows = layer.target.weight.size(0), columns = layer.target.weight.size(1);
    const std::string& name = layer.target.name;
    // Both bounds are 1/sqrt(fan in): alpha reads `columns` inputs, beta one.
    const bool random_alpha = options_.residual && (options_.beta || options_.random_init);
    at::Tensor alpha = uniform(name, "spp.alpha", seed, {options_.groups, columns},
                               1.0 / std::sqrt(static_cast<double>(columns)));
    if (!random_alpha) alpha.fill_(options_.residual ? 0.0 : 1.0);
    parameters.push_back({name + "/alpha", alpha, 1.0});
    if (!options_.beta) continue;
    at::Tensor beta = uniform(name, "spp.beta", seed, {rows}, 1.0);
    if (!options_.residual || !options_.random_init) beta.fill_(options_.residual ? 0.0 : 1.0);
    parameters.push_back({name + "/beta", beta, 1.0});
  }
  return parameters;
}

void Spp::bind(const train::ParameterSet& parameters) {
  for (Layer& layer : layers_) {
    layer.alpha = parameters.parameters()[layer.first_parameter].value;
    if (options_.beta) layer.beta = parameters.parameters()[layer.first_parameter + 1].value;
    layer.effective = at::empty_like(layer.target.weight);
  }
}

void Spp::prepare_step(Workers& workers) {
  const bool beside = options_.dropout > 0 || !options_.residual;
  workers.for_each(static_cast<int64_t>(layers_.size()), [&](int64_t i, int) {
    layers_[i].write_effective(beside ? 0.0f : 1.0f, layers_[i].effective);
  });
}

at::Tensor Spp::apply(int64_t target, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                      const UnitKey& key) const {
  const Layer& layer = layers_[target];
  // An undefined tensor is no argument of an autograd function; an absent one is.
  const std::optional<at::Tensor> beta = options_.beta ? std::optional(layer.beta) : std::nullopt;
  const at::Tensor y = options_.dropout > 0
                           ? SppDropoutLinear::apply(x, layer.alpha, beta, &layer, key)
                           : SppLinear::apply(x, layer.alpha, beta, &layer);
  return bias ? at::add(y, *bias) : y;
}

std::vector<int64_t> Spp::parameters_of(int64_t target) const {
  const int64_t first = layers_[target].first_parameter;
  return options_.beta ? std::vector{first, first + 1} : std::vector{first};
}

at::Tensor Spp::merged(int64_t target) const {
  const Layer& layer = layers_[target];
  at::Tensor out = at::empty_like(layer.target.weight);
  layer.write_effective(options_.residual ? 1.0f : 0.0f, out);
  return out;
}

class SppMethod : public AdapterMethod {
 public:
  explicit SppMethod(const SppOptions& options) : options_(options) {}

  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    if (rows % options_.groups != 0)
      throw UserError(
          fmt::format("{} [{}, {}]: retrain.row_groups = {} does not divide its {} rows; choose a "
                      "divisor or leave the matrix out of retrain.targets",
                      matrix, rows, columns, options_.groups, rows));
  }
  bool needs_kept() const override { return false; }
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override {
    return options_.groups * columns + (options_.beta ? rows : 0);
  }
  std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                  const AttachOptions&) const override {
    for (const Target& t : targets) check(t.name, t.weight.size(0), t.weight.size(1));
    return std::make_unique<Spp>(options_, std::move(targets));
  }

 private:
  SppOptions options_;
};

std::unique_ptr<AdapterMethod> read_spp(const config::Section& section) {
  SppOptions options;
  options.groups = section.integer_or("row_groups", options.groups, {.low = 1});
  options.scale = section.number_or("scale", options.scale, {.low = 0, .low_open = true});
  options.dropout =
      section.number_or("dropout", options.dropout, {.low = 0, .high = 1, .high_open = true});
  options.beta = section.flag_or("beta", options.beta);
  options.residual = section.flag_or("residual", options.residual);
  const std::string init = section.text_or("init", "zero");
  if (init != "zero" && init != "random")
    section.fail("init", fmt::format("'{}' is none of zero, random", init));
  options.random_init = init == "random";
  return make_spp(options);
}

const AdapterRegistration registration{
    "spp", read_spp, {"row_groups", "scale", "dropout", "beta", "residual", "init"}};

}  // namespace

std::unique_ptr<AdapterMethod> make_spp(const SppOptions& options) {
  return std::make_unique<SppMethod>(options);
}

}  // namespace espalier::retrain
