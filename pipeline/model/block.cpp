#include "pipeline/model/block.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <numbers>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/attention.h"
#include "pipeline/model/disentangled_attention.h"
#include "pipeline/model/kernels.h"
#include "pipeline/model/stored_layers.h"

namespace espalier::model {
namespace {

using kernels::Storage;

Storage storage_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? Storage::float32 : Storage::bfloat16;
}

/// A copy in memory of our own: the mapped pages may then go.
at::Tensor load_tensor(const io::Checkpoint& checkpoint, const std::string& name,
                       at::ScalarType dtype, const at::Device& device) {
  at::Tensor out = checkpoint.view(name).to(at::TensorOptions().dtype(dtype).device(device),
                                            /*non_blocking=*/false, /*copy=*/true);
  checkpoint.drop(name);
  return out;
}

/// A layer's part of the stored tensor `name`, as load_tensor.
at::Tensor load_layer(const io::Checkpoint& checkpoint, const Architecture& a, const Linear& linear,
                      const std::string& name, at::ScalarType dtype, const at::Device& device) {
  at::Tensor out = layer_part(a, linear, checkpoint.view(name))
                       .to(at::TensorOptions().dtype(dtype).device(device),
                           /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  checkpoint.drop(name);
  return out;
}

NormWeights load_norm(const io::Checkpoint& checkpoint, const Names& names,
                      const std::string& prefix, at::ScalarType dtype, const at::Device& device) {
  NormWeights norm;
  if (!names.weight.empty())
    norm.weight = load_tensor(checkpoint, prefix + names.weight, dtype, device);
  if (!names.bias.empty()) norm.bias = load_tensor(checkpoint, prefix + names.bias, dtype, device);
  return norm;
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight, bool from_one, double epsilon) {
    at::Tensor y = at::empty_like(x);
    at::Tensor inverse_rms = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
    kernels::rms_norm(storage_of(x), x.const_data_ptr(), weight.const_data_ptr(), from_one,
                      x.size(0), x.size(1), static_cast<float>(epsilon), y.data_ptr(),
                      inverse_rms.data_ptr<float>());
    context->save_for_backward({x, weight, inverse_rms});
    context->saved_data["from_one"] = from_one;
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dx, dweight;
    if (context->needs_input_grad(0)) {
      dx = at::empty_like(saved[0]);
      kernels::rms_norm_backward(
          storage_of(dx), saved[0].const_data_ptr(), saved[1].const_data_ptr(),
          context->saved_data["from_one"].toBool(), dy.const_data_ptr(),
          saved[2].const_data_ptr<float>(), dx.size(0), dx.size(1), dx.data_ptr());
    }
    if (context->needs_input_grad(1)) {
      const at::Tensor normed = saved[0].to(at::kFloat) * saved[2].unsqueeze(1);
      dweight = (normed * dy.to(at::kFloat)).sum(0).to(saved[1].scalar_type());
    }
    return {dx, dweight, {}, {}};
  }
};

struct SiluTimes : torch::autograd::Function<SiluTimes> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& gate,
                            const at::Tensor& up) {
    context->save_for_backward({gate, up});
    return run(gate, up);
  }
  static at::Tensor run(const at::Tensor& gate, const at::Tensor& up) {
    at::Tensor y = at::empty_like(gate);
    kernels::silu_times(storage_of(y), gate.const_data_ptr(), up.const_data_ptr(), y.numel(),
                        y.data_ptr());
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor dy = gradients[0].contiguous();
    at::Tensor dgate = at::empty_like(saved[0]), dup = at::empty_like(saved[1]);
    kernels::silu_times_backward(storage_of(dy), saved[0].const_data_ptr(),
                                 saved[1].const_data_ptr(), dy.const_data_ptr(), dy.numel(),
                                 dgate.data_ptr(), dup.data_ptr());
    return {dgate, dup};
  }
};

/// silu(gate) * up.
at::Tensor gated_silu(const at::Tensor& gate, const at::Tensor& up) {
  if (!gate.is_cpu()) return at::silu(gate) * up;
  if (gate.requires_grad() || up.requires_grad()) return SiluTimes::apply(gate, up);
  return SiluTimes::run(gate, up);
}

at::Tensor activate(Activation activation, const at::Tensor& x) {
  switch (activation) {
    case Activation::silu:
      return at::silu(x);
    case Activation::gelu:
      return at::gelu(x);
    case Activation::gelu_tanh:
      return at::gelu(x, "tanh");
    case Activation::relu:
      return at::relu(x);
  }
  throw DefectError("activation: unknown");
}

at::Tensor apply_linear(const Architecture& a, const BlockWeights& block, Role role,
                        const at::Tensor& x, const LinearHook& linear) {
  const at::Tensor& bias = block.bias[role];
  const at::Tensor y = linear(*a.find(role), x, block.weight[role],
                              bias.defined() ? std::optional(bias) : std::nullopt);
  const bool more = y.defined() && !block.added.empty() && block.added[role];
  return more ? add_terms(*block.added[role], x, y) : y;
}

at::Tensor feed_forward(const Architecture& a, const BlockWeights& block, const at::Tensor& x,
                        const LinearHook& linear) {
  const auto apply = [&](Role role, const at::Tensor& input) {
    return apply_linear(a, block, role, input, linear);
  };
  if (!a.gated()) {
    const at::Tensor up = apply(kUp, x);
    return up.defined() ? apply(kDown, activate(a.activation, up)) : up;
  }
  const at::Tensor gate = apply(kGate, x), up = apply(kUp, x);
  if (!gate.defined() || !up.defined()) return {};
  return apply(kDown, a.activation == Activation::silu ? gated_silu(gate, up)
                                                       : activate(a.activation, gate) * up);
}

/// The norm of each head's features, where the family has one; x [tokens, heads * size].
at::Tensor norm_heads(const Architecture& a, const NormWeights& norm, const at::Tensor& x) {
  if (!norm.weight.defined()) return x;
  return apply_norm(a, norm, x.view({-1, a.head_size})).view(x.sizes());
}

/// Keys or values [tokens, key_value_heads * size] with a head to each query head, where what is
/// left of the query heads does not share them evenly.
at::Tensor for_each_query_head(const Architecture& a, const BlockWeights& block,
                               const at::Tensor& x) {
  if (!block.key_value_of.defined()) return x;
  return x.view({x.size(0), block.key_value_heads, a.head_size})
      .index_select(1, block.key_value_of)
      .flatten(1);
}

/// DeBERTa's: the embeddings of distances pass through q's and k's layers too, or through their
/// own.
at::Tensor relative_attention(const Architecture& a, const BlockWeights& block, const at::Tensor& q,
                              const at::Tensor& k, const at::Tensor& v, const UnitShape& unit,
                              const LinearHook& linear) {
  const auto project = [&](const NormWeights& own, Role role) {
    const at::Tensor& embeddings = block.relative_positions;
    return own.weight.defined() ? linalg::linear(embeddings, own.weight, own.bias)
                                : apply_linear(a, block, role, embeddings, linear);
  };
  at::Tensor position_key, position_query;
  if (a.relative->content_to_position) position_key = project(block.relative_key, kKey);
  if (a.relative->position_to_content) position_query = project(block.relative_query, kQuery);
  return disentangled_attention(q, k, v, position_key, position_query, *a.relative, unit.sequences,
                                block.heads, unit.visible);
}

at::Tensor self_attention(const Architecture& a, const BlockWeights& block, const at::Tensor& x,
                          const UnitShape& unit, const RotaryTable& rotary,
                          const LinearHook& linear) {
  const auto apply = [&](Role role, const at::Tensor& input) {
    return apply_linear(a, block, role, input, linear);
  };
  const bool even = !block.key_value_of.defined();
  const AttentionShape shape{block.heads,      even ? block.key_value_heads : block.heads,
                             a.head_size,      a.task == Task::causal,
                             a.sliding_window, a.rotary ? a.rotary->rotated : 0};
  const at::Tensor q = norm_heads(a, block.query_norm, apply(kQuery, x));
  const at::Tensor k = for_each_query_head(a, block, norm_heads(a, block.key_norm, apply(kKey, x)));
  const at::Tensor v = for_each_query_head(a, block, apply(kValue, x));
  if (a.relative) return apply(kOutput, relative_attention(a, block, q, k, v, unit, linear));
  const at::Tensor attended =
      unit.trees.empty()
          ? attention(q, k, v, rotary.cosine, rotary.sine, unit.sequences, shape, unit.visible)
          : tree_attention(q, k, v, rotary.cosine, rotary.sine, unit.trees, shape);
  return apply(kOutput, attended);
}

/// Attention and feed-forward of the same x, behind one norm or each behind its own.
at::Tensor parallel_block(const Architecture& a, const BlockWeights& block, const at::Tensor& x,
                          const UnitShape& unit, const RotaryTable& rotary,
                          const LinearHook& linear) {
  const at::Tensor normed = apply_norm(a, block.attention_norm, x);
  const at::Tensor attended = self_attention(a, block, normed, unit, rotary, linear);
  if (!attended.defined()) return {};
  const bool own_norm = block.feed_forward_norm.weight.defined();
  const at::Tensor fed =
      feed_forward(a, block, own_norm ? apply_norm(a, block.feed_forward_norm, x) : normed, linear);
  return fed.defined() ? x + attended + fed : fed;
}

/// The learned position of every token, as rows of the table.
at::Tensor embed_positions(const Architecture& a, const Ends& ends, const at::Tensor& tokens,
                           const UnitShape& unit) {
  if (unit.length > a.max_positions)
    throw UserError(fmt::format("sequence length {} is above the model's {} learned positions",
                                unit.length, a.max_positions));
  if (!unit.trees.empty()) {
    if (a.padding_token) throw DefectError("trees of a model that counts its positions");
    return ends.position_embedding.index_select(0, tree_positions(unit.trees) + a.position_offset);
  }
  if (!a.padding_token)
    return ends.position_embedding.narrow(0, a.position_offset, unit.length)
        .repeat({unit.sequences, 1});
  const at::Tensor counts = tokens.ne(*a.padding_token).view({unit.sequences, unit.length});
  // Padding itself has the row before the first position.
  const at::Tensor rows = counts.cumsum(1) * counts + (a.position_offset - 1);
  return ends.position_embedding.index_select(0, rows.flatten());
}

}  // namespace

BlockWeights load_block(const io::Checkpoint& checkpoint, const Architecture& a, int64_t index,
                        at::ScalarType dtype, const at::Device& device) {
  BlockWeights block;
  block.weight.resize(kRoles);
  block.bias.resize(kRoles);
  block.added.resize(kRoles);
  const BlockHeads heads = a.heads_of(index);
  block.heads = heads.queries();
  block.key_value_heads = heads.key_values();
  if (!heads.shared_evenly())
    block.key_value_of = at::tensor(heads.key_value_of, at::kLong).to(device);
  for (const auto& of_all : a.linears) {
    const Linear linear = a.in_block(index, of_all);
    block.weight[linear.role] =
        load_layer(checkpoint, a, linear, stored_weight_name(a, index, linear), dtype, device);
    if (linear.bias)
      block.bias[linear.role] =
          load_layer(checkpoint, a, linear, stored_bias_name(a, index, linear), dtype, device);
    if (const auto terms =
            load_terms(checkpoint, a.weight_name(index, linear), linear.out, linear.in))
      block.added[linear.role] = prepared_terms(*terms, dtype);
  }
  const std::string prefix = a.tensor_name(index, "");
  block.attention_norm = load_norm(checkpoint, a.attention_norm, prefix, dtype, device);
  block.feed_forward_norm = load_norm(checkpoint, a.feed_forward_norm, prefix, dtype, device);
  block.query_norm = load_norm(checkpoint, a.query_norm, prefix, dtype, device);
  block.key_norm = load_norm(checkpoint, a.key_norm, prefix, dtype, device);
  if (!a.relative) return block;
  block.relative_positions = relative_positions(a, load_relative(checkpoint, a, dtype, device));
  block.relative_key = load_norm(checkpoint, a.relative->key, prefix, dtype, device);
  block.relative_query = load_norm(checkpoint, a.relative->query, prefix, dtype, device);
  return block;
}

RotaryTable rotary_table(const Architecture& a, int64_t length, const at::Device& device) {
  if (!a.rotary) return {};
  const Rotary& r = *a.rotary;
  const int64_t half = r.rotated / 2;
  RotaryTable table{at::empty({length, half}), at::empty({length, half})};
  float* cosine = table.cosine.data_ptr<float>();
  float* sine = table.sine.data_ptr<float>();
  for (int64_t i = 0; i < half; ++i) {
    double frequency =
        std::pow(r.theta, -2.0 * static_cast<double>(i) / static_cast<double>(r.rotated));
    if (r.type == "linear") frequency /= r.factor;
    if (r.type == "llama3") {
      // Long waves are stretched, short ones kept, those between blended (LLaMA 3.1).
      const double turns =
          static_cast<double>(r.original_positions) * frequency / (2 * std::numbers::pi);
      const double keep = std::clamp(
          (turns - r.low_frequency_factor) / (r.high_frequency_factor - r.low_frequency_factor),
          0.0, 1.0);
      frequency = (1 - keep) * frequency / r.factor + keep * frequency;
    }
    for (int64_t position = 0; position < length; ++position) {
      // float32 angles, as the reference computes them.
      const float angle = static_cast<float>(position) * static_cast<float>(frequency);
      cosine[position * half + i] = std::cos(angle);
      sine[position * half + i] = std::sin(angle);
    }
  }
  if (device.is_cpu()) return table;
  return {table.cosine.to(device), table.sine.to(device)};
}

LinearHook plain_linear() {
  return [](const Linear&, const at::Tensor& x, const at::Tensor& weight,
            const std::optional<at::Tensor>& bias) { return linalg::linear(x, weight, bias); };
}

at::Tensor apply_norm(const Architecture& a, const NormWeights& norm, const at::Tensor& x) {
  if (a.norm == Norm::layer)
    return at::layer_norm(x, {x.size(1)}, norm.weight, norm.bias, a.norm_epsilon);
  if (!x.is_cpu()) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor y = wide * at::rsqrt(wide.square().mean(1, true) + a.norm_epsilon);
    if (a.norm_from_one) return (y * (1 + norm.weight.to(at::kFloat))).to(x.scalar_type());
    return y.to(x.scalar_type()) * norm.weight;
  }
  if (x.requires_grad() || norm.weight.requires_grad())
    return RmsNorm::apply(x, norm.weight, a.norm_from_one, a.norm_epsilon);
  at::Tensor y = at::empty_like(x);
  kernels::rms_norm(storage_of(x), x.const_data_ptr(), norm.weight.const_data_ptr(),
                    a.norm_from_one, x.size(0), x.size(1), static_cast<float>(a.norm_epsilon),
                    y.data_ptr(), nullptr);
  return y;
}

at::Tensor block_forward(const Architecture& a, const BlockWeights& block,
                         const at::Tensor& hidden_states, const UnitShape& unit,
                         const RotaryTable& rotary, const LinearHook& linear) {
  const at::Tensor& x = hidden_states;
  if (a.parallel) return parallel_block(a, block, x, unit, rotary, linear);
  const at::Tensor attended = self_attention(
      a, block, a.norm_first ? apply_norm(a, block.attention_norm, x) : x, unit, rotary, linear);
  if (!attended.defined()) return {};
  if (a.norm_first) {
    const at::Tensor middle = x + attended;
    const at::Tensor fed =
        feed_forward(a, block, apply_norm(a, block.feed_forward_norm, middle), linear);
    return fed.defined() ? middle + fed : fed;
  }
  const at::Tensor middle = apply_norm(a, block.attention_norm, x + attended);
  const at::Tensor fed = feed_forward(a, block, middle, linear);
  return fed.defined() ? apply_norm(a, block.feed_forward_norm, middle + fed) : fed;
}

RelativeEmbeddings load_relative(const io::Checkpoint& checkpoint, const Architecture& a,
                                 at::ScalarType dtype, const at::Device& device) {
  if (!a.relative) return {};
  return {load_tensor(checkpoint, a.relative->embedding, dtype, device),
          load_norm(checkpoint, a.relative->norm, "", dtype, device)};
}

at::Tensor relative_positions(const Architecture& a, const RelativeEmbeddings& embeddings) {
  const NormWeights& norm = embeddings.norm;
  return norm.weight.defined() ? apply_norm(a, norm, embeddings.weight) : embeddings.weight;
}

Ends load_ends(const io::Checkpoint& checkpoint, const Architecture& a, at::ScalarType dtype,
               const at::Device& device) {
  const auto load = [&](const std::string& name) {
    return name.empty() ? at::Tensor() : load_tensor(checkpoint, name, dtype, device);
  };
  Ends ends;
  ends.token_embedding = load(a.token_embedding);
  ends.position_embedding = load(a.position_embedding);
  ends.type_embedding = load(a.type_embedding);
  ends.embedding_norm = load_norm(checkpoint, a.embedding_norm, "", dtype, device);
  ends.final_norm = load_norm(checkpoint, a.final_norm, "", dtype, device);
  ends.head = a.head == a.token_embedding ? ends.token_embedding : load(a.head);
  ends.head_bias = load(a.head_bias);
  ends.project_in = load(a.project_in);
  ends.project_out = load(a.project_out);
  return ends;
}

at::Tensor embed(const Architecture& a, const Ends& ends, const at::Tensor& tokens,
                 const UnitShape& unit) {
  at::Tensor x = ends.token_embedding.index_select(0, tokens);
  if (a.embedding_scale != 1) x = x * at::scalar_tensor(a.embedding_scale, x.options());
  if (ends.project_in.defined()) x = linalg::linear(x, ends.project_in);
  if (ends.position_embedding.defined()) x = x + embed_positions(a, ends, tokens, unit);
  if (ends.type_embedding.defined())
    x = x + (unit.token_types.defined() ? ends.type_embedding.index_select(0, unit.token_types)
                                        : ends.type_embedding[0]);
  return ends.embedding_norm.weight.defined() ? apply_norm(a, ends.embedding_norm, x) : x;
}

at::Tensor finish(const Architecture& a, const Ends& ends, const at::Tensor& hidden_states) {
  const at::Tensor x = ends.final_norm.weight.defined()
                           ? apply_norm(a, ends.final_norm, hidden_states)
                           : hidden_states;
  return ends.project_out.defined() ? linalg::linear(x, ends.project_out) : x;
}

}  // namespace espalier::model
