#include "pipeline/train/cross_entropy.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>

#include "pipeline/data/sampler.h"
#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/train/softmax_kernel.h"

namespace espalier::train {

namespace {

constexpr int64_t kChunk = 256;

/// The counted positions and their labels, checked.
struct Counted {
  at::Tensor positions, labels;  // int64 [counted]
};

Counted counted_of(const at::Tensor& labels, int64_t vocabulary) {
  Counted counted;
  counted.positions = labels.ne(data::kIgnored).nonzero().view({-1});
  counted.labels = labels.index_select(0, counted.positions).contiguous();
  if (counted.labels.numel() == 0) return counted;
  const int64_t low = counted.labels.min().item<int64_t>();
  const int64_t high = counted.labels.max().item<int64_t>();
  if (low < 0 || high >= vocabulary)
    throw DefectError(fmt::format("a label of {} is outside the vocabulary [0, {})",
                                  low < 0 ? low : high, vocabulary));
  return counted;
}

/// Gives body the float32 logits of every chunk: (first counted index, logits [chunk, vocabulary]).
void for_each_chunk(const at::Tensor& rows, const at::Tensor& head, const at::Tensor& bias,
                    const std::function<void(int64_t, at::Tensor&)>& body) {
  const int64_t counted = rows.size(0);
  const at::Tensor buffer =
      at::empty({std::min(kChunk, counted), head.size(0)}, rows.options().dtype(at::kFloat));
  for (int64_t first = 0; first < counted; first += kChunk) {
    const int64_t count = std::min(kChunk, counted - first);
    at::Tensor logits = buffer.narrow(0, 0, count);
    linalg::product_into(logits, rows.narrow(0, first, count), head.t());
    if (bias.defined()) logits.add_(bias);
    body(first, logits);
  }
}

}  // namespace

LossSum loss_sum(const at::Tensor& hidden_states, const at::Tensor& head, const at::Tensor& labels,
                 bool with_gradient, bool with_head_gradient, const at::Tensor& bias) {
  const at::NoGradGuard no_grad;
  const int64_t vocabulary = head.size(0);
  const Counted counted = counted_of(labels, vocabulary);
  const int64_t* label = counted.labels.const_data_ptr<int64_t>();
  const at::Tensor rows = hidden_states.index_select(0, counted.positions);
  const bool narrow = rows.scalar_type() == at::kBFloat16;

  LossSum sum;
  sum.counted = counted.labels.numel();
  at::Tensor row_gradient, logits_gradient;
  if (with_gradient) row_gradient = at::empty_like(rows);
  if (with_head_gradient) sum.head_gradient = at::zeros(head.sizes(), at::kFloat);
  if (with_gradient && bias.defined()) sum.bias_gradient = at::zeros({vocabulary}, at::kFloat);
  if (with_gradient && narrow)
    logits_gradient = at::empty({std::min(kChunk, sum.counted), vocabulary}, rows.options());

  for_each_chunk(rows, head, bias, [&](int64_t first, at::Tensor& logits) {
    const int64_t count = logits.size(0);
    float* values = logits.data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) {
      float* row = values + i * vocabulary;
      if (!with_gradient) {
        sum.loss += row_loss(row, vocabulary, label[first + i]);
        continue;
      }
      auto* out =
          narrow ? static_cast<uint16_t*>(logits_gradient.data_ptr()) + i * vocabulary : nullptr;
      sum.loss += row_loss_and_gradient(row, vocabulary, label[first + i], out);
    }
    if (!with_gradient) return;
    at::Tensor out = row_gradient.narrow(0, first, count);
    const at::Tensor of_logits = narrow ? logits_gradient.narrow(0, 0, count) : logits;
    linalg::product_into(out, of_logits, head);
    if (with_head_gradient)
      sum.head_gradient.add_(
          linalg::product(of_logits.t(), rows.narrow(0, first, count), at::kFloat));
    if (sum.bias_gradient.defined())
      sum.bias_gradient.add_(at::sum(of_logits, {0}, false, at::kFloat));
  });

  if (with_gradient) {
    sum.gradient = at::zeros_like(hidden_states);
    sum.gradient.index_copy_(0, counted.positions, row_gradient);
  }
  return sum;
}

at::Tensor token_losses(const at::Tensor& hidden_states, const at::Tensor& head,
                        const at::Tensor& labels, const at::Tensor& bias) {
  const at::NoGradGuard no_grad;
  const int64_t vocabulary = head.size(0);
  const Counted counted = counted_of(labels, vocabulary);
  const int64_t* label = counted.labels.const_data_ptr<int64_t>();
  const int64_t* position = counted.positions.const_data_ptr<int64_t>();
  const at::Tensor losses = at::zeros({labels.numel()}, at::kDouble);
  double* loss = losses.data_ptr<double>();
  for_each_chunk(hidden_states.index_select(0, counted.positions), head, bias,
                 [&](int64_t first, at::Tensor& logits) {
                   const float* values = logits.const_data_ptr<float>();
                   for (int64_t i = 0; i < logits.size(0); ++i)
                     loss[position[first + i]] =
                         row_loss(values + i * vocabulary, vocabulary, label[first + i]);
                 });
  return losses;
}

}  // namespace espalier::train
