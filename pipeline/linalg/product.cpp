#include "pipeline/linalg/product.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/linalg/onednn/matmul.h"

namespace espalier::linalg {
namespace {

onednn::Type type_of(const at::Tensor& t, const char* what) {
  if (t.scalar_type() == at::kFloat) return onednn::Type::float32;
  if (t.scalar_type() == at::kBFloat16) return onednn::Type::bfloat16;
  throw DefectError(fmt::format("product: {} is {}; float32 and bfloat16 are taken", what,
                                c10::toString(t.scalar_type())));
}

/// A matrix, or a batch of them.
onednn::Operand operand(const at::Tensor& t, const char* what) {
  int64_t row = t.stride(-2), column = t.stride(-1);
  // A dimension of one element has no stride that matters; give it the one its neighbour implies.
  if (t.size(-1) == 1 && row != 1) column = 1;
  if (t.size(-2) == 1 && column != 1) row = 1;
  return {t.const_data_ptr(),
          type_of(t, what),
          t.size(-2),
          t.size(-1),
          row,
          column,
          t.dim() == 3 ? t.stride(0) : 0};
}

at::Tensor usable(const at::Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
}

/// Whether products here take bfloat16 as it is.
bool narrow_products() {
  static const bool takes = onednn::takes_bfloat16();
  return takes;
}

at::Tensor as_taken(const at::Tensor& t) {
  return narrow_products() || t.scalar_type() == at::kFloat ? t : t.to(at::kFloat);
}

/// out = a b (+ bias of out's type). Where the processor has no such products of bfloat16, they are
/// taken in float32, exact products and sums of the same kind, and rounded once at the end.
void multiply(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
              const at::Tensor& bias = {}, int64_t batch = 1) {
  const at::Tensor left = as_taken(a), right = as_taken(b);
  const at::Tensor added = bias.defined() ? as_taken(bias) : bias;
  const bool direct = narrow_products() || out.scalar_type() == at::kFloat;
  const at::Tensor result = direct ? out : at::empty(out.sizes(), out.options().dtype(at::kFloat));
  onednn::matmul(operand(left, "a"), operand(right, "b"), operand(result, "out"),
                 added.defined() ? added.const_data_ptr() : nullptr, batch);
  if (!direct) out.copy_(result);
}

at::Tensor forward_linear(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias) {
  if (!x.is_cpu()) return at::linear(x, weight, bias);
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  multiply(y, usable(x), weight.t(), bias.value_or(at::Tensor()));
  return y;
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    // Of a frozen weight the inputs need not stay in memory.
    context->save_for_backward(weight.requires_grad() ? torch::autograd::variable_list{weight, x}
                                                      : torch::autograd::variable_list{weight});
    context->saved_data["has_bias"] = bias.has_value();  // an absent one is no input
    return forward_linear(x, weight, bias);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &weight = saved[0], &dy = gradients[0];
    at::Tensor dx, dweight, dbias;
    if (context->needs_input_grad(0)) dx = product(dy, weight, dy.scalar_type());
    if (context->needs_input_grad(1)) dweight = product(dy.t(), saved[1], weight.scalar_type());
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2))
      dbias = at::sum(dy, {0}, false, at::kFloat).to(dy.scalar_type());
    return {dx, dweight, dbias};
  }
};

}  // namespace

void product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_cpu()) {
    out.copy_(at::matmul(a, b));
    return;
  }
  if (a.size(1) == 0) {
    out.zero_();
    return;
  }
  multiply(out, usable(a), usable(b));
}

void batched_product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_cpu()) {
    out.copy_(at::matmul(a, b));
    return;
  }
  multiply(out, a, b, {}, out.size(0));
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType out_type) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options().dtype(out_type));
  product_into(out, a, b);
  return out;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  if (x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()))
    return Linear::apply(x, weight, bias);
  return forward_linear(x, weight, bias);
}

void gram_into(at::Tensor& out, const at::Tensor& x) {
  // Columns of X are wide strips; each strip meets only what lies at or right of it.
  constexpr int64_t kStrip = 192;
  const int64_t n = x.size(1);
  const at::Tensor taken = x.is_cpu() ? as_taken(x) : x;  // converted once, not a strip at a time
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t width = std::min(kStrip, n - first);
    at::Tensor block = out.narrow(0, first, width).narrow(1, first, n - first);
    product_into(block, taken.narrow(1, first, width).t(), taken.narrow(1, first, n - first));
  }
}

std::string product_description() {
  return onednn::description() + (narrow_products() ? "" : ", bfloat16 by way of float32");
}

void one_library_thread() {
  at::set_num_threads(1);
  onednn::one_thread();
}

}  // namespace espalier::linalg
