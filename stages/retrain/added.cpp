#include "stages/retrain/added.h"

#include <ATen/ATen.h>

#include "pipeline/linalg/product.h"
#include "stages/retrain/dropout.h"

namespace espalier::retrain {

AddedMatrix::AddedMatrix(Target target, const AddedOptions& options, at::Tensor positions)
    : AdaptedMatrix(std::move(target)), options_(options), positions_(std::move(positions)) {
  if (!positions_.defined()) return;
  position_rows_ = positions_.div(columns(), "floor");
  position_columns_ = positions_.remainder(columns());
}

at::Tensor AddedMatrix::added() const {
  at::Tensor sum = linalg::product(terms_.up, terms_.down, at::kFloat);
  if (positions_.defined()) sum.view(-1).index_add_(0, positions_, terms_.values);
  return sum.mul_(options_.scale);
}

void AddedMatrix::prepare() {
  terms_ = terms();
  if (masked()) {
    effective_ = sum_inside(target().weight, added(), target().kept, options_.dropout == 0);
    return;
  }
  down_ = terms_.down.to(type());
  up_ = terms_.up.mul(options_.scale).to(type());
  if (positions_.defined()) entries_ = terms_.values.mul(options_.scale).to(type());
}

at::Tensor AddedMatrix::dropped(const at::Tensor& x, const UnitKey& key) const {
  return options_.dropout > 0 ? dropout(x, options_.dropout, key, target().name) : x;
}

at::Tensor AddedMatrix::forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const {
  const at::Tensor read = dropped(x, key);
  saved = {read};
  if (masked() && options_.dropout == 0) return linalg::product(x, effective_.t(), type());
  at::Tensor y = linalg::product(x, target().weight.t(), type());
  if (masked()) return y.add_(linalg::product(read, effective_.t(), type()));
  const at::Tensor narrow = linalg::product(read, down_.t(), type());
  saved.push_back(narrow);
  y.add_(linalg::product(narrow, up_.t(), type()));
  if (positions_.defined())
    y.index_add_(1, position_rows_, read.index_select(1, position_columns_).mul_(entries_));
  return y;
}

AdaptedMatrix::Gradients AddedMatrix::backward_masked(const at::Tensor& dy, const Saved& saved,
                                                      const UnitKey& key, bool x_wanted) const {
  Gradients gradients;
  if (x_wanted) {
    gradients.x = linalg::product(dy, effective_, type());
    if (options_.dropout > 0)
      gradients.x = dropped(gradients.x, key).add_(linalg::product(dy, target().weight, type()));
  }
  const at::Tensor g = weight_gradient(dy, saved[0], target().kept).mul_(options_.scale);
  Terms terms;
  terms.up = linalg::product(g, terms_.down.t(), at::kFloat);
  if (trains_down()) terms.down = linalg::product(terms_.up.t(), g, at::kFloat);
  if (positions_.defined()) terms.values = g.view(-1).index_select(0, positions_);
  gradients.parameters = pull_back(terms);
  return gradients;
}

AdaptedMatrix::Gradients AddedMatrix::backward(const at::Tensor& dy, const Saved& saved,
                                               const UnitKey& key, bool x_wanted) const {
  if (masked()) return backward_masked(dy, saved, key, x_wanted);
  const at::Tensor &read = saved[0], &narrow = saved[1];
  const at::Tensor d_narrow = linalg::product(dy, up_, type());
  Terms terms;
  terms.up = linalg::product(dy.t(), narrow, at::kFloat).mul_(options_.scale);
  if (trains_down()) terms.down = linalg::product(d_narrow.t(), read, at::kFloat);
  at::Tensor dy_there;
  if (positions_.defined()) {
    dy_there = dy.index_select(1, position_rows_);
    const at::Tensor x_there = read.index_select(1, position_columns_);
    terms.values = dy_there.to(at::kFloat).mul(x_there).sum(0).mul_(options_.scale);
  }
  Gradients gradients;
  gradients.parameters = pull_back(terms);
  if (!x_wanted) return gradients;
  at::Tensor d_read = linalg::product(d_narrow, down_, type());
  if (positions_.defined()) d_read.index_add_(1, position_columns_, dy_there.mul_(entries_));
  gradients.x = dropped(d_read, key).add_(linalg::product(dy, target().weight, type()));
  return gradients;
}

at::Tensor AddedMatrix::merged() const {
  return sum_inside(target().weight, added(), target().kept);
}

std::optional<model::AddedTerms> AddedMatrix::beside() const {
  model::AddedTerms terms;
  terms.down = terms_.down;
  terms.up = terms_.up;
  terms.scale = options_.scale;
  terms.positions = positions_;
  if (positions_.defined()) terms.values = terms_.values.mul(options_.scale);
  return terms;
}

}  // namespace espalier::retrain
