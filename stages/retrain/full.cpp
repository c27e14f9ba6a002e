#include "stages/retrain/full.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"

namespace espalier::retrain {

namespace {

using Mask = FullOptions::Mask;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct FullLayer {
  Target target;
  const FullOptions* options;
  double sparsity = 0;   // of an unstructured mask that moves
  at::Tensor value;      // float32, the leaf
  at::Tensor mask;       // bool; undefined: everything acts
  at::Tensor effective;  // what acts, in the model's type

  void prepare() {
    const at::NoGradGuard no_grad;
    if (options->mask != Mask::fixed)
      mask = chosen_mask(value.detach(), options->keep, options->group, sparsity);
    effective = (mask.defined() ? value.detach() * mask : value.detach())
                    .to(target.weight.scalar_type())
                    .contiguous();
  }
  /// dL/dvalue from dL/d(what acts), in place; `counted` labels are in the unit's loss sum, which
  /// is divided by their number at the end.
  void to_value_gradient(at::Tensor& gradient, int64_t counted) const {
    if (options->mask == Mask::fixed && mask.defined()) gradient.mul_(mask);
    if (options->mask == Mask::sr_ste)
      gradient.add_(value.detach() * mask.logical_not(),
                    options->decay * static_cast<double>(counted));
  }
};

struct FullLinear : torch::autograd::Function<FullLinear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& value,
                            const FullLayer* layer, int64_t counted) {
    (void)value;  // an input only so that autograd asks for its gradient
    context->save_for_backward({x});
    context->saved_data["layer"] = reinterpret_cast<int64_t>(layer);
    context->saved_data["counted"] = counted;
    return linalg::product(x, layer->effective.t(), x.scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto* layer = reinterpret_cast<const FullLayer*>(context->saved_data["layer"].toInt());
    const at::Tensor x = context->get_saved_variables()[0];
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx;
    if (context->needs_input_grad(0)) dx = linalg::product(dy, layer->effective, dy.scalar_type());
    at::Tensor gradient = linalg::product(dy.t(), x, at::kFloat);
    layer->to_value_gradient(gradient, context->saved_data["counted"].toInt());
    return {dx, gradient, at::Tensor(), at::Tensor()};
  }
};

class Full : public Adapter {
 public:
  Full(const FullOptions& options, std::vector<Target> targets) : options_(options) {
    for (Target& target : targets) {
      FullLayer layer{std::move(target), &options_, 0, {}, {}, {}};
      const at::Tensor zero = layer.target.weight.eq(0);
      layer.sparsity =
          options_.sparsity.value_or(zero.sum().item<double>() / static_cast<double>(zero.numel()));
      if (options_.mask == Mask::fixed && layer.target.kept.defined())
        layer.mask = layer.target.kept.to(at::kBool);
      layers_.push_back(std::move(layer));
    }
  }
  Full(const Full&) = delete;
  Full& operator=(const Full&) = delete;

  std::vector<train::Parameter> initial_parameters(uint64_t) const override {
    std::vector<train::Parameter> parameters;
    for (const FullLayer& layer : layers_)
      parameters.push_back({layer.target.name + "/value", layer.target.weight.to(at::kFloat), 1.0});
    return parameters;
  }
  void bind(const train::ParameterSet& parameters) override {
    for (size_t i = 0; i < layers_.size(); ++i) layers_[i].value = parameters.parameters()[i].value;
  }
  void prepare_step(Workers& workers) override {
    workers.for_each(static_cast<int64_t>(layers_.size()),
                     [&](int64_t i, int) { layers_[i].prepare(); });
  }
  at::Tensor apply(int64_t target, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                   const UnitKey& key) const override {
    const FullLayer& layer = layers_[target];
    const at::Tensor y = FullLinear::apply(x, layer.value, &layer, key.counted);
    return bias ? at::add(y, *bias) : y;
  }
  std::vector<int64_t> parameters_of(int64_t target) const override { return {target}; }
  at::Tensor merged(int64_t target) const override { return layers_[target].effective.clone(); }

 private:
  FullOptions options_;
  std::vector<FullLayer> layers_;
};

class FullMethod : public AdapterMethod {
 public:
  explicit FullMethod(const FullOptions& options) : options_(options) {}

  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    if (options_.group > 0 && columns % options_.group != 0)
      throw UserError(fmt::format(
          "{} [{}, {}]: retrain.mask_pattern {}:{} does not divide its {} inputs; leave the matrix "
          "out of retrain.targets",
          matrix, rows, columns, options_.keep, options_.group, columns));
  }
  std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                  const AttachOptions&) const override {
    for (const Target& t : targets) check(t.name, t.weight.size(0), t.weight.size(1));
    return std::make_unique<Full>(options_, std::move(targets));
  }
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override {
    return rows * columns;
  }
  bool trains(const Site&) const override { return true; }
  nlohmann::json settings() const override {
    const auto name = [&] {
      if (options_.mask == Mask::fixed) return "fixed";
      return options_.mask == Mask::ste ? "ste" : "sr_ste";
    };
    const std::string pattern =
        options_.group > 0 ? fmt::format("{}:{}", options_.keep, options_.group) : "unstructured";
    nlohmann::json settings = {
        {"mask", name()}, {"mask_pattern", pattern}, {"mask_decay", options_.decay}};
    settings["mask_sparsity"] =
        options_.sparsity ? nlohmann::json(*options_.sparsity) : nlohmann::json();
    return settings;
  }

 private:
  FullOptions options_;
};

/// mask: fixed keeps the base's zeros and chooses none.
void refuse_moving_mask(const config::Section& section) {
  if (section.text_or("mask_pattern", "unstructured") != "unstructured")
    section.fail("mask_pattern",
                 "mask: fixed keeps the base's zeros; set it to unstructured, or "
                 "choose mask: ste or sr_ste");
  if (!section.is_null("mask_sparsity"))
    section.fail(
        "mask_sparsity",
        "mask: fixed keeps the base's zeros; set it to null, or choose mask: ste or sr_ste");
  section.allow({"mask_decay"});
}

void read_moving_mask(const config::Section& section, FullOptions& options) {
  const std::string pattern = section.text_or("mask_pattern", "unstructured");
  options.sparsity =
      section.optional_number("mask_sparsity", {.low = 0, .high = 1, .high_open = true});
  options.decay = section.number_or("mask_decay", options.decay, {.low = 0});
  if (pattern == "unstructured") return;
  int keep = 0, group = 0, used = 0;
  const bool read = std::sscanf(pattern.c_str(), "%d:%d%n", &keep, &group, &used) == 2 &&
                    used == static_cast<int>(pattern.size());
  if (!read || keep < 1 || keep >= group || group > 64)
    section.fail(
        "mask_pattern",
        fmt::format("'{}' is neither unstructured nor K:M with 1 <= K < M <= 64", pattern));
  if (options.sparsity)
    section.fail("mask_sparsity",
                 fmt::format("mask_pattern {} says how many go; set it to null", pattern));
  options.keep = keep;
  options.group = group;
}

std::unique_ptr<AdapterMethod> read_full(const config::Section& section) {
  FullOptions options;
  const std::string mask = section.text_or("mask", "fixed");
  if (mask == "fixed")
    options.mask = Mask::fixed;
  else if (mask == "ste")
    options.mask = Mask::ste;
  else if (mask == "sr_ste")
    options.mask = Mask::sr_ste;
  else
    section.fail("mask", fmt::format("'{}' is none of fixed, ste, sr_ste", mask));
  if (options.mask == Mask::fixed)
    refuse_moving_mask(section);
  else
    read_moving_mask(section, options);
  if (options.mask != Mask::fixed && section.text_or("merge", "masked") != "dense")
    section.fail("merge", fmt::format("mask: {} chooses anew which weights are zeros, so the "
                                      "base's do not stay; set merge: dense",
                                      mask));
  return make_full(options);
}

const AdapterRegistration registration{
    "full", read_full, {"mask", "mask_pattern", "mask_sparsity", "mask_decay"}};

}  // namespace

at::Tensor chosen_mask(const at::Tensor& weight, int64_t keep, int64_t group, double sparsity) {
  const at::Tensor size = weight.abs().contiguous();
  const float* sizes = size.const_data_ptr<float>();
  at::Tensor mask = at::ones(weight.sizes(), at::kBool);
  bool* kept = mask.data_ptr<bool>();
  std::vector<int64_t> order;
  const auto drop_smallest = [&](int64_t first, int64_t count, int64_t dropped) {
    if (dropped == 0) return;
    order.resize(count);
    std::iota(order.begin(), order.end(), first);
    std::nth_element(
        order.begin(), order.begin() + dropped - 1, order.end(),
        [&](int64_t a, int64_t b) { return sizes[a] != sizes[b] ? sizes[a] < sizes[b] : a < b; });
    for (int64_t i = 0; i < dropped; ++i) kept[order[i]] = false;
  };
  if (group == 0) {
    const auto dropped =
        static_cast<int64_t>(std::floor(sparsity * static_cast<double>(size.numel())));
    drop_smallest(0, size.numel(), dropped);
  } else {
    for (int64_t first = 0; first < size.numel(); first += group)
      drop_smallest(first, group, group - keep);
  }
  return mask;
}

std::unique_ptr<AdapterMethod> make_full(const FullOptions& options) {
  return std::make_unique<FullMethod>(options);
}

}  // namespace espalier::retrain
