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

at::Tensor forward_linear(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias) {
  if (!x.is_cpu()) return at::linear(x, weight, bias);
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  const at::Tensor a = usable(x), b = weight.t();
  const void* added = bias ? bias->const_data_ptr() : nullptr;
  onednn::matmul(operand(a, "x"), operand(b, "weight"), operand(y, "y"), added);
  return y;
}

struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    context->save_for_backward({weight});
    context->saved_data["has_bias"] = bias.has_value();  // an absent one is no input
    return forward_linear(x, weight, bias);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const at::Tensor weight = context->get_saved_variables()[0], &dy = gradients[0];
    at::Tensor dx, dbias;
    if (context->needs_input_grad(0)) dx = product(dy, weight, dy.scalar_type());
    if (context->saved_data["has_bias"].toBool() && context->needs_input_grad(2))
      dbias = at::sum(dy, {0}, false, at::kFloat).to(dy.scalar_type());
    return {dx, {}, dbias};
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
  const at::Tensor left = usable(a), right = usable(b);
  onednn::matmul(operand(left, "a"), operand(right, "b"), operand(out, "out"));
}

void batched_product_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_cpu()) {
    out.copy_(at::matmul(a, b));
    return;
  }
  onednn::matmul(operand(a, "a"), operand(b, "b"), operand(out, "out"), nullptr, out.size(0));
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType out_type) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options().dtype(out_type));
  product_into(out, a, b);
  return out;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  if (x.requires_grad() || (bias && bias->requires_grad()))
    return FrozenLinear::apply(x, weight, bias);
  return forward_linear(x, weight, bias);
}

void gram_into(at::Tensor& out, const at::Tensor& x) {
  // Columns of X are wide strips; each strip meets only what lies at or right of it.
  constexpr int64_t kStrip = 192;
  const int64_t n = x.size(1);
  for (int64_t first = 0; first < n; first += kStrip) {
    const int64_t width = std::min(kStrip, n - first);
    at::Tensor block = out.narrow(0, first, width).narrow(1, first, n - first);
    product_into(block, x.narrow(1, first, width).t(), x.narrow(1, first, n - first));
  }
}

std::string product_description() { return onednn::description(); }

void one_library_thread() {
  at::set_num_threads(1);
  onednn::one_thread();
}

}  // namespace espalier::linalg
