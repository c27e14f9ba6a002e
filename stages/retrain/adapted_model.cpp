#include "stages/retrain/adapted_model.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/train/cross_entropy.h"

namespace espalier::retrain {

namespace {

/// "q_proj" and "*_proj" match by the last part of a layer's name, "self_attn.*" by the whole of
/// it.
bool matches(const model::Linear& linear, const std::string& pattern) {
  const std::string last = linear.name.substr(linear.name.rfind('.') + 1);
  return fnmatch(pattern.c_str(), last.c_str(), 0) == 0 ||
         fnmatch(pattern.c_str(), linear.name.c_str(), 0) == 0;
}

}  // namespace

std::vector<const model::Linear*> matching_layers(const model::Architecture& architecture,
                                                  const std::vector<std::string>& targets) {
  std::vector<const model::Linear*> layers;
  std::vector<bool> used(targets.size(), false);
  for (const model::Linear& linear : architecture.linears) {
    bool wanted = targets.empty();
    for (size_t t = 0; t < targets.size(); ++t) {
      if (!matches(linear, targets[t])) continue;
      wanted = used[t] = true;
    }
    if (wanted) layers.push_back(&linear);
  }
  const auto unused = std::find(used.begin(), used.end(), false);
  if (unused == used.end()) return layers;
  std::vector<std::string> names;
  for (const model::Linear& linear : architecture.linears) names.push_back(linear.name);
  throw UserError(
      fmt::format("retrain.targets: '{}' matches no linear layer of this {} model, which has {}",
                  targets[unused - used.begin()], architecture.model_type, fmt::join(names, ", ")));
}

/// What the blocks of one unit share, and the unit's way through them.
struct AdaptedModel::Pass {
  model::UnitShape shape;
  model::RotaryTable rotary;
  UnitKey key;
  std::vector<at::Tensor> inputs, outputs;  // by block; an output is kept with its graph
};

AdaptedModel::AdaptedModel(const io::Checkpoint& checkpoint,
                           const model::Architecture& architecture, at::ScalarType dtype,
                           const AdapterMethod& method, const std::vector<std::string>& targets,
                           const AttachOptions& options)
    : architecture_(architecture), ends_(model::load_ends(checkpoint, architecture, dtype)) {
  const std::vector<const model::Linear*> layers = matching_layers(architecture, targets);
  first_adapted_ = architecture.blocks;
  for (int64_t b = 0; b < architecture.blocks; ++b) {
    blocks_.push_back(model::load_block(checkpoint, architecture, b, dtype));
    target_of_.emplace_back().fill(-1);
    for (const model::Linear* layer : layers) {
      target_of_[b][layer->role] = static_cast<int64_t>(targets_.size());
      targets_.push_back({architecture.weight_name(b, *layer), b, blocks_[b].weight[layer->role],
                          blocks_[b].bias[layer->role]});
      const at::Tensor kept = targets_.back().weight.ne(0).to(at::kByte);
      if (options.merge == Merge::masked && kept.eq(0).any().item<bool>())
        targets_.back().kept = kept;
      first_adapted_ = std::min(first_adapted_, b);
    }
  }
  adapter_ = method.attach(targets_, options);
}

std::unique_ptr<train::ParameterSet> AdaptedModel::make_parameters(uint64_t seed) {
  auto parameters = std::make_unique<train::ParameterSet>(adapter_->initial_parameters(seed));
  adapter_->bind(*parameters);
  parameter_values_.clear();
  for (const train::Parameter& parameter : parameters->parameters())
    parameter_values_.push_back(parameter.value);
  parameters_of_.assign(blocks_.size(), {});
  for (size_t t = 0; t < targets_.size(); ++t)
    for (const int64_t p : adapter_->parameters_of(static_cast<int64_t>(t)))
      parameters_of_[targets_[t].block].push_back(p);
  return parameters;
}

at::Tensor AdaptedModel::forward_block(int64_t block, const at::Tensor& hidden_states,
                                       const Pass& pass) const {
  const auto hook = [&](const model::Linear& linear, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
    const int64_t target = target_of_[block][linear.role];
    return target < 0 ? linalg::linear(x, weight, bias)
                      : adapter_->apply(target, x, bias, pass.key);
  };
  return model::block_forward(architecture_, blocks_[block], hidden_states, pass.shape, pass.rotary,
                              hook);
}

/// The loss, and its gradient at the last block's output.
at::Tensor AdaptedModel::backward_head(const at::Tensor& hidden_states, const data::Batch& batch,
                                       train::UnitLoss& loss) const {
  const at::AutoGradMode with_grad(true);
  const at::Tensor input = hidden_states.detach().set_requires_grad(true);
  const at::Tensor normed = model::apply_norm(architecture_, ends_.final_norm, input);
  const train::LossSum sum =
      train::loss_sum(normed.detach(), ends_.head, batch.labels.reshape({-1}), true);
  loss.loss = sum.loss;
  loss.counted = sum.counted;
  loss.tokens = batch.tokens.numel();
  return torch::autograd::grad({normed}, {input}, {sum.gradient})[0];
}

void AdaptedModel::fail_not_finite(const Pass& pass, const at::Tensor& last, double loss) const {
  std::string where = "the logits";
  const auto finite = [](const at::Tensor& t) { return at::isfinite(t).all().item<bool>(); };
  if (!finite(pass.inputs.front())) {
    where = "the token embeddings";
  } else {
    for (size_t b = 0; b < blocks_.size(); ++b) {
      if (finite(b + 1 < blocks_.size() ? pass.inputs[b + 1] : last)) continue;
      where = fmt::format("the hidden states that leave block {} ({}{})", b,
                          architecture_.block_prefix, b);
      break;
    }
  }
  throw NumericalError(fmt::format(
      "step {}, sequence {}: the loss is {}: {} are the first that are not finite; lower "
      "retrain.learning_rate or set model.dtype=float32",
      pass.key.step + 1, pass.key.first_sequence, loss, where));
}

train::UnitLoss AdaptedModel::loss_and_gradients(const data::Batch& batch, const UnitKey& key,
                                                 bool recompute,
                                                 const train::GradientSink& sink) const {
  const auto blocks = static_cast<int64_t>(blocks_.size());
  Pass pass;
  pass.shape.sequences = batch.tokens.size(0);
  pass.shape.length = batch.tokens.size(1);
  pass.rotary = model::rotary_table(architecture_, pass.shape.length);
  pass.key = key;
  pass.outputs.resize(blocks);
  at::Tensor hidden_states;
  {
    const at::NoGradGuard no_grad;
    hidden_states = model::embed(architecture_, ends_, batch.tokens.reshape({-1}), pass.shape);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    // The graph of the last block is used at once: keeping it costs no more than making it anew.
    const bool keep = b >= first_adapted_ && (!recompute || b + 1 == blocks);
    const at::AutoGradMode grad_mode(keep);
    at::Tensor input = hidden_states.detach();
    if (b > first_adapted_) input.set_requires_grad(true);
    pass.inputs.push_back(input);
    const at::Tensor output = forward_block(b, input, pass);
    if (keep) pass.outputs[b] = output;
    hidden_states = output.detach();
  }

  train::UnitLoss loss;
  at::Tensor gradient = backward_head(hidden_states, batch, loss);
  if (!std::isfinite(loss.loss)) fail_not_finite(pass, hidden_states, loss.loss);

  const at::AutoGradMode with_grad(true);
  for (int64_t b = blocks - 1; b >= first_adapted_; --b) {
    at::Tensor output =
        pass.outputs[b].defined() ? pass.outputs[b] : forward_block(b, pass.inputs[b], pass);
    pass.outputs[b].reset();
    std::vector<at::Tensor> wanted;
    for (const int64_t p : parameters_of_[b]) wanted.push_back(parameter_values_[p]);
    if (b > first_adapted_) wanted.push_back(pass.inputs[b]);
    const std::vector<at::Tensor> gradients =
        torch::autograd::grad({output}, wanted, {gradient}, std::nullopt, false, true);
    for (size_t i = 0; i < parameters_of_[b].size(); ++i)
      if (gradients[i].defined()) sink(parameters_of_[b][i], gradients[i]);
    if (b > first_adapted_) gradient = gradients.back();
    pass.inputs[b].reset();
  }
  return loss;
}

}  // namespace espalier::retrain
