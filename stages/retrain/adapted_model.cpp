#include "stages/retrain/adapted_model.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/train/cross_entropy.h"

namespace espalier::retrain {

namespace {

using torch::autograd::grad;

std::vector<std::string> names_of(const std::optional<model::SequenceHead>& head) {
  std::vector<std::string> names;
  if (head)
    for (const model::HeadTensor& tensor : head->tensors) names.push_back(tensor.name);
  return names;
}

at::Tensor mask_of(const at::Tensor& weight) {
  const at::Tensor kept = weight.ne(0);
  return kept.all().item<bool>() ? at::Tensor() : kept.to(at::kByte);
}

/// Of each tensor of the head: float 1 where it is trained, undefined where it is all of it. A
/// pooler that was pruned keeps its zeros.
std::vector<at::Tensor> kept_of(const std::optional<model::SequenceHead>& head, Merge merge) {
  if (!head) return {};
  std::vector<at::Tensor> kept(head->tensors.size());
  const model::HeadTensor& pooler = head->tensors.front();
  const bool pools = head->pooling != model::SequenceHead::Pooling::last_token;
  if (!pools || pooler.created || merge == Merge::dense) return kept;
  const at::Tensor there = pooler.value.ne(0);
  if (there.any().item<bool>() && !there.all().item<bool>()) kept.front() = there.to(at::kFloat);
  return kept;
}

/// Next tokens and classes that do not count are negative, numbers NaN.
int64_t counted_labels(const UnitBatch& batch) {
  const at::Tensor& labels = batch.labels;
  const bool numbers = at::isFloatingType(labels.scalar_type());
  return (numbers ? labels.isnan().logical_not() : labels.ge(0)).sum().item<int64_t>();
}

ModelOptions with_attach(const std::vector<std::string>& targets, const AttachOptions& attach) {
  ModelOptions options(targets);
  options.attach = attach;
  return options;
}

}  // namespace

/// What the blocks of one unit share, and the unit's way through them.
struct AdaptedModel::Pass {
  model::UnitShape shape;
  model::RotaryTable rotary;
  UnitKey key;
  at::Tensor relative;                      // DeBERTa's, where they are trained: of all blocks
  std::vector<at::Tensor> inputs, outputs;  // by block; an output is kept with its graph
};

AdaptedModel::AdaptedModel(const io::Checkpoint& checkpoint,
                           const model::Architecture& architecture, at::ScalarType dtype,
                           const AdapterMethod& method, const ModelOptions& options)
    : architecture_(architecture),
      dtype_(dtype),
      ends_(model::load_ends(checkpoint, architecture, dtype)),
      relative_(model::load_relative(checkpoint, architecture, dtype)),
      target_of_(architecture.blocks),
      sites_of_(architecture.blocks),
      head_(options.head),
      problem_(options.problem),
      head_kept_(kept_of(options.head, options.attach.merge)),
      head_rate_factor_(options.head_rate_factor),
      without_terms_(options.without_terms),
      first_trained_(architecture.blocks) {
  Selection selection =
      select(checkpoint, architecture, method, options.targets, names_of(options.head));
  for (int64_t b = 0; b < architecture.blocks; ++b) {
    blocks_.push_back(model::load_block(checkpoint, architecture, b, dtype));
    target_of_[b].fill(-1);
  }
  const bool masked = options.attach.merge == Merge::masked && method.needs_kept();
  for (const Matrix& matrix : selection.matrices) {
    model::BlockWeights& block = blocks_[matrix.block];
    const model::Role role = matrix.linear.role;
    target_of_[matrix.block][role] = static_cast<int64_t>(targets_.size());
    if (options.without_terms) block.added[role].reset();
    targets_.push_back({architecture.weight_name(matrix.block, matrix.linear), matrix.block,
                        block.weight[role], masked ? mask_of(block.weight[role]) : at::Tensor(),
                        role});
    first_trained_ = std::min(first_trained_, matrix.block);
  }
  sites_ = std::move(selection.sites);
  for (size_t s = 0; s < sites_.size(); ++s) {
    const Site& site = sites_[s].site;
    const auto index = static_cast<int64_t>(s);
    if (sites_[s].in_block) {
      sites_of_[site.block].push_back(index);
      first_trained_ = std::min(first_trained_, site.block);
    } else if (sites_[s].in_relative) {
      relative_sites_.push_back(index);
      first_trained_ = 0;
    } else {
      (site.block < 0 ? front_sites_ : behind_sites_).push_back(index);
    }
  }
  adapter_ = method.attach(targets_, options.attach);
}

AdaptedModel::AdaptedModel(const io::Checkpoint& checkpoint,
                           const model::Architecture& architecture, at::ScalarType dtype,
                           const AdapterMethod& method, const std::vector<std::string>& targets,
                           const AttachOptions& attach)
    : AdaptedModel(checkpoint, architecture, dtype, method, with_attach(targets, attach)) {}

std::unique_ptr<train::ParameterSet> AdaptedModel::make_parameters(uint64_t seed) {
  std::vector<train::Parameter> all = adapter_->initial_parameters(seed);
  first_site_ = static_cast<int64_t>(all.size());
  for (const PlacedSite& placed : sites_) {
    at::Tensor& frozen = placed.in_block      ? placed.in_block(blocks_[placed.site.block])
                         : placed.in_relative ? placed.in_relative(relative_)
                                              : placed.in_ends(ends_);
    all.push_back({placed.site.name + "/value", frozen.to(at::kFloat), 1.0});
  }
  if (head_)
    for (const model::HeadTensor& tensor : head_->tensors)
      all.push_back({tensor.name + "/value", tensor.value, head_rate_factor_});

  auto parameters = std::make_unique<train::ParameterSet>(std::move(all));
  adapter_->bind(*parameters);
  parameter_values_.clear();
  for (const train::Parameter& parameter : parameters->parameters())
    parameter_values_.push_back(parameter.value);
  parameters_of_.assign(blocks_.size(), {});
  for (size_t t = 0; t < targets_.size(); ++t)
    for (const int64_t p : adapter_->parameters_of(static_cast<int64_t>(t)))
      parameters_of_[targets_[t].block].push_back(p);
  for (size_t b = 0; b < blocks_.size(); ++b)
    for (const int64_t s : sites_of_[b]) parameters_of_[b].push_back(first_site_ + s);
  return parameters;
}

int64_t AdaptedModel::head_size() const {
  int64_t size = 0;
  for (const at::Tensor& value : head_parameters()) size += value.numel();
  return size;
}

std::vector<at::Tensor> AdaptedModel::head_parameters() const {
  return {parameter_values_.begin() + first_head_parameter(), parameter_values_.end()};
}

AdaptedModel::Pass AdaptedModel::make_pass(const UnitBatch& batch, const UnitKey& key) const {
  Pass pass;
  pass.shape.sequences = batch.tokens.size(0);
  pass.shape.length = batch.tokens.size(1);
  pass.shape.visible = batch.visible;
  if (batch.token_types.defined()) pass.shape.token_types = batch.token_types.reshape({-1});
  pass.rotary = model::rotary_table(architecture_, pass.shape.length);
  pass.key = key;
  return pass;
}

model::Ends AdaptedModel::current_ends(bool with_graph) const {
  model::Ends ends = ends_;
  for (const auto* part : {&front_sites_, &behind_sites_})
    for (const int64_t s : *part) {
      const at::Tensor& value = parameter_values_[first_site_ + s];
      sites_[s].in_ends(ends) = (with_graph ? value : value.detach()).to(dtype_);
    }
  if (architecture_.head == architecture_.token_embedding) ends.head = ends.token_embedding;
  return ends;
}

at::Tensor AdaptedModel::trained_relative(bool with_graph) const {
  if (relative_sites_.empty()) return {};
  const at::AutoGradMode grad_mode(with_graph);
  model::RelativeEmbeddings embeddings = relative_;
  for (const int64_t s : relative_sites_) {
    const at::Tensor& value = parameter_values_[first_site_ + s];
    sites_[s].in_relative(embeddings) = (with_graph ? value : value.detach()).to(dtype_);
  }
  return model::relative_positions(architecture_, embeddings);
}

at::Tensor AdaptedModel::forward_block(int64_t block, const at::Tensor& hidden_states,
                                       const Pass& pass) const {
  const at::Tensor& relative =
      pass.relative.defined() ? pass.relative : blocks_[block].relative_positions;
  const auto hook = [&](const model::Linear& linear, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias) {
    const int64_t target = target_of_[block][linear.role];
    if (target < 0) return linalg::linear(x, weight, bias);
    UnitKey key = pass.key;
    // DeBERTa sends its relative positions through q and k too: they are no tokens of the unit.
    if (x.is_same(relative)) {
      key.evaluating = true;
      key.counted = 0;
    }
    return adapter_->apply(target, x, bias, key);
  };
  if (sites_of_[block].empty() && !pass.relative.defined())
    return model::block_forward(architecture_, blocks_[block], hidden_states, pass.shape,
                                pass.rotary, hook);
  model::BlockWeights weights = blocks_[block];
  weights.relative_positions = relative;
  for (const int64_t s : sites_of_[block])
    sites_[s].in_block(weights) = parameter_values_[first_site_ + s].to(dtype_);
  return model::block_forward(architecture_, weights, hidden_states, pass.shape, pass.rotary, hook);
}

/// The loss, and its gradient at the last block's output. That of a tied embedding is left in
/// `tied_gradient`: what it gets as an embedding is still to come.
at::Tensor AdaptedModel::backward_head(const at::Tensor& hidden_states, const UnitBatch& batch,
                                       train::UnitLoss& loss, const train::GradientSink& sink,
                                       at::Tensor& tied_gradient) const {
  const at::AutoGradMode with_grad(true);
  const model::Ends ends = current_ends(true);
  const at::Tensor input = hidden_states.detach().set_requires_grad(true);
  const at::Tensor out = model::finish(architecture_, ends, input);
  const bool head_trained = ends.head.requires_grad();
  const train::LossSum sum =
      train::loss_sum(out.detach(), ends.head.detach(), batch.labels.reshape({-1}), true,
                      head_trained, ends.head_bias);
  loss.loss = sum.loss;
  loss.counted = sum.counted;
  loss.tokens = batch.tokens.numel();
  std::vector<at::Tensor> wanted = {input};
  std::vector<int64_t> parameters;
  bool own_head = false;
  for (const int64_t s : behind_sites_) {
    const int64_t parameter = first_site_ + s;
    if (sites_[s].site.kind == Site::Kind::head) {
      sink(parameter, sum.head_gradient);
      own_head = true;
    } else if (sites_[s].site.name == architecture_.head_bias) {
      sink(parameter, sum.bias_gradient);
    } else {
      wanted.push_back(parameter_values_[parameter]);
      parameters.push_back(parameter);
    }
  }
  if (head_trained && !own_head) tied_gradient = sum.head_gradient;
  const std::vector<at::Tensor> gradients =
      grad({out}, wanted, {sum.gradient}, std::nullopt, false, true);
  for (size_t i = 0; i < parameters.size(); ++i) sink(parameters[i], gradients[i + 1]);
  return gradients[0];
}

train::UnitLoss AdaptedModel::sequence_loss_of(const at::Tensor& value,
                                               const UnitBatch& batch) const {
  return {value.item<double>(), counted_labels(batch), batch.tokens.numel()};
}

/// The same for the head of a classification or regression.
at::Tensor AdaptedModel::backward_sequence_head(const at::Tensor& hidden_states,
                                                const UnitBatch& batch, const Pass& pass,
                                                train::UnitLoss& loss,
                                                const train::GradientSink& sink) const {
  const at::AutoGradMode with_grad(true);
  const at::Tensor input = hidden_states.detach().set_requires_grad(true);
  const at::Tensor out = model::finish(architecture_, current_ends(true), input);
  const at::Tensor value = model::sequence_loss(
      model::sequence_logits(*head_, head_parameters(), out, pass.shape), batch.labels, problem_);
  loss = sequence_loss_of(value.detach(), batch);
  std::vector<at::Tensor> wanted = {input};
  std::vector<int64_t> parameters;
  for (const int64_t s : behind_sites_) parameters.push_back(first_site_ + s);
  for (size_t h = 0; h < head_->tensors.size(); ++h)
    parameters.push_back(first_head_parameter() + static_cast<int64_t>(h));
  for (const int64_t p : parameters) wanted.push_back(parameter_values_[p]);
  const std::vector<at::Tensor> gradients = grad({value}, wanted, {}, std::nullopt, false, true);
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!gradients[i + 1].defined()) continue;
    const int64_t of_head = parameters[i] - first_head_parameter();
    const bool masked = of_head >= 0 && head_kept_[of_head].defined();
    sink(parameters[i], masked ? gradients[i + 1] * head_kept_[of_head] : gradients[i + 1]);
  }
  return gradients[0];
}

void AdaptedModel::backward_embedding(const at::Tensor& embedded, const at::Tensor& gradient,
                                      const at::Tensor& tied_gradient,
                                      const train::GradientSink& sink) const {
  std::vector<at::Tensor> wanted;
  for (const int64_t s : front_sites_) wanted.push_back(parameter_values_[first_site_ + s]);
  const std::vector<at::Tensor> gradients =
      grad({embedded}, wanted, {gradient}, std::nullopt, false, true);
  for (size_t i = 0; i < front_sites_.size(); ++i) {
    const int64_t s = front_sites_[i];
    const bool tied = tied_gradient.defined() && sites_[s].site.name == architecture_.head;
    if (gradients[i].defined())
      sink(first_site_ + s, tied ? gradients[i] + tied_gradient : gradients[i]);
  }
}

void AdaptedModel::backward_relative(const at::Tensor& relative, const at::Tensor& gradient,
                                     const train::GradientSink& sink) const {
  std::vector<at::Tensor> wanted;
  for (const int64_t s : relative_sites_) wanted.push_back(parameter_values_[first_site_ + s]);
  const std::vector<at::Tensor> gradients = grad({relative}, wanted, {gradient.to(dtype_)});
  for (size_t i = 0; i < relative_sites_.size(); ++i)
    sink(first_site_ + relative_sites_[i], gradients[i]);
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

train::UnitLoss AdaptedModel::loss_and_gradients(const UnitBatch& batch, const UnitKey& key,
                                                 bool recompute,
                                                 const train::GradientSink& sink) const {
  const auto blocks = static_cast<int64_t>(blocks_.size());
  Pass pass = make_pass(batch, key);
  pass.key.counted = counted_labels(batch);
  pass.outputs.resize(blocks);
  const bool front = !front_sites_.empty();
  const int64_t first = front ? 0 : first_trained_;
  at::Tensor embedded;
  {
    const at::AutoGradMode grad_mode(front);
    embedded =
        model::embed(architecture_, current_ends(front), batch.tokens.reshape({-1}), pass.shape);
  }
  // The blocks' gradients of what they all read are summed before they go further.
  const at::Tensor relative = trained_relative(true);
  at::Tensor relative_gradient;
  if (relative.defined()) {
    pass.relative = relative.detach().set_requires_grad(true);
    relative_gradient = at::zeros(relative.sizes(), at::kFloat);
  }
  at::Tensor hidden_states = embedded.detach();
  for (int64_t b = 0; b < blocks; ++b) {
    // The graph of the last block is used at once: keeping it costs no more than making it anew.
    const bool keep = b >= first && (!recompute || b + 1 == blocks);
    const at::AutoGradMode grad_mode(keep);
    at::Tensor input = hidden_states.detach();
    if (b > first || front) input.set_requires_grad(true);
    pass.inputs.push_back(input);
    const at::Tensor output = forward_block(b, input, pass);
    if (keep) pass.outputs[b] = output;
    hidden_states = output.detach();
  }

  train::UnitLoss loss;
  at::Tensor tied_gradient;
  at::Tensor gradient = head_ ? backward_sequence_head(hidden_states, batch, pass, loss, sink)
                              : backward_head(hidden_states, batch, loss, sink, tied_gradient);
  if (!std::isfinite(loss.loss)) fail_not_finite(pass, hidden_states, loss.loss);

  const at::AutoGradMode with_grad(true);
  for (int64_t b = blocks - 1; b >= first; --b) {
    at::Tensor output =
        pass.outputs[b].defined() ? pass.outputs[b] : forward_block(b, pass.inputs[b], pass);
    pass.outputs[b].reset();
    std::vector<at::Tensor> wanted;
    for (const int64_t p : parameters_of_[b]) wanted.push_back(parameter_values_[p]);
    const bool onwards = b > first || front;
    if (pass.relative.defined()) wanted.push_back(pass.relative);
    if (onwards) wanted.push_back(pass.inputs[b]);
    const std::vector<at::Tensor> gradients =
        grad({output}, wanted, {gradient}, std::nullopt, false, true);
    for (size_t i = 0; i < parameters_of_[b].size(); ++i)
      if (gradients[i].defined()) sink(parameters_of_[b][i], gradients[i]);
    if (relative.defined() && gradients[parameters_of_[b].size()].defined())
      relative_gradient.add_(gradients[parameters_of_[b].size()]);
    if (onwards) gradient = gradients.back();
    pass.inputs[b].reset();
  }
  if (front) backward_embedding(embedded, gradient, tied_gradient, sink);
  if (relative.defined()) backward_relative(relative, relative_gradient, sink);
  return loss;
}

at::Tensor AdaptedModel::hidden_states(const UnitBatch& batch, const UnitKey& key) const {
  const at::NoGradGuard no_grad;
  Pass pass = make_pass(batch, key);
  pass.relative = trained_relative(false);
  const model::Ends ends = current_ends(false);
  at::Tensor hidden_states =
      model::embed(architecture_, ends, batch.tokens.reshape({-1}), pass.shape);
  for (size_t b = 0; b < blocks_.size(); ++b)
    hidden_states = forward_block(static_cast<int64_t>(b), hidden_states, pass);
  return model::finish(architecture_, ends, hidden_states);
}

AdaptedModel::Evaluation AdaptedModel::evaluate(const UnitBatch& batch, const UnitKey& key) const {
  const at::NoGradGuard no_grad;
  const at::Tensor last = hidden_states(batch, key);
  if (!head_) {
    const model::Ends ends = current_ends(false);
    const train::LossSum sum =
        train::loss_sum(last, ends.head, batch.labels.reshape({-1}), false, false, ends.head_bias);
    return {{sum.loss, sum.counted, batch.tokens.numel()}, {}};
  }
  const at::Tensor logits =
      model::sequence_logits(*head_, head_parameters(), last, make_pass(batch, key).shape);
  return {sequence_loss_of(model::sequence_loss(logits, batch.labels, problem_), batch), logits};
}

}  // namespace espalier::retrain
