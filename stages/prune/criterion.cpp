#include "stages/prune/criterion.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"

namespace espalier::prune {
namespace {

at::Tensor draws(const std::string& name, int64_t first, int64_t count, uint64_t seed) {
  const CounterRandom random(seed, "prune.dsee", stream_of(name));
  at::Tensor out = at::empty({count}, at::kFloat);
  float* values = out.data_ptr<float>();
  for (int64_t i = 0; i < count; ++i)
    values[i] = static_cast<float>(random.uniform(static_cast<uint64_t>(first + i)));
  return out;
}

/// dW of the rows, float32 [rows, in].
at::Tensor change(const model::AddedTerms& terms, int64_t first, int64_t rows, int64_t columns) {
  at::Tensor sum = at::zeros({rows, columns}, at::kFloat);
  if (terms.low_rank()) {
    linalg::product_into(sum, terms.up.narrow(0, first, rows), terms.down);
    sum.mul_(terms.scale);
  }
  if (!terms.sparse()) return sum;
  const at::Tensor positions = terms.positions.contiguous(), values = terms.values.contiguous();
  const int64_t* at_position = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i) {
    const int64_t offset = at_position[i] - first * columns;
    if (offset >= 0 && offset < rows * columns)
      sum.data_ptr<float>()[offset] += values.const_data_ptr<float>()[i];
  }
  return sum;
}

}  // namespace

bool changes_matrix(const Terms& terms) { return terms && (terms->low_rank() || terms->sparse()); }

at::Tensor judged_rows(Criterion criterion, const std::string& name, const at::Tensor& weight,
                       const Terms& terms, uint64_t seed, int64_t first, int64_t rows) {
  const int64_t columns = weight.size(1);
  if (criterion == Criterion::random)
    return draws(name, first * columns, rows * columns, seed).view({rows, columns});
  const bool of_change = criterion != Criterion::magnitude && changes_matrix(terms);
  at::Tensor judged =
      of_change ? change(*terms, first, rows, columns) : at::zeros({rows, columns}, at::kFloat);
  if (criterion != Criterion::delta) judged += weight.narrow(0, first, rows);
  judged.abs_();
  if (!at::isfinite(judged).all().item<bool>())
    throw NumericalError(fmt::format(
        "{}: a weight or an added term is NaN or Inf before pruning; check the checkpoint, or "
        "lower retrain.learning_rate",
        name));
  return judged;
}

std::vector<double> judged_heads(Criterion criterion, const Judged& q, const Judged& v,
                                 const model::BlockHeads& heads, int64_t head_size, uint64_t seed) {
  const bool of_change = criterion == Criterion::delta || criterion == Criterion::merged;
  if (of_change && !changes_matrix(q.terms) && !changes_matrix(v.terms))
    throw UserError(fmt::format(
        "prune.criterion: heads are judged by what stands beside q and v, and nothing stands "
        "beside "
        "{} or {}: put a retrain stage with merge: beside before this one, with both among its "
        "targets, or take magnitude or random",
        q.name, v.name));
  std::vector<double> scores;
  const CounterRandom random(seed, "prune.dsee.heads", stream_of(q.name));
  const auto sum = [&](const Judged& matrix, int64_t head) {
    return judged_rows(criterion, matrix.name, matrix.weight, matrix.terms, seed, head * head_size,
                       head_size)
        .to(at::kDouble)
        .sum()
        .item<double>();
  };
  for (int64_t head = 0; head < heads.queries(); ++head)
    scores.push_back(criterion == Criterion::random
                         ? random.uniform(static_cast<uint64_t>(heads.query[head]))
                         : sum(q, head) + sum(v, heads.key_value_of[head]));
  return scores;
}

std::vector<int64_t> lowest(const std::vector<double>& scores, int64_t count) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] < scores[b]; });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace espalier::prune
