#include "stages/retrain/block_map.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "stages/retrain/start_values.h"

namespace espalier::retrain {

namespace {

/// [rows, width] as float32 [rows, blocks, width / blocks].
at::Tensor by_block(const at::Tensor& x, int64_t blocks) {
  return x.to(at::kFloat).contiguous().view({x.size(0), blocks, x.size(1) / blocks});
}

class Reflections : public BlockMap {
 public:
  explicit Reflections(const ReflectionOptions& options) : options_(options) {}

  std::vector<train::Parameter> initial(const std::string& name, uint64_t seed) const override {
    at::Tensor start =
        uniform_start(seed, "ether.u", name, {options_.blocks, options_.width / options_.blocks},
                      options_.start_bound);
    if (options_.start_norm > 0) start = start.mul(options_.start_norm / start.norm(2, {1}, true));
    std::vector<train::Parameter> parameters;
    for (int64_t k = 0; k < parameter_count(); ++k)
      parameters.push_back({k == 0 ? name : name + std::to_string(k + 1), start.clone(), 1.0});
    return parameters;
  }
  int64_t parameter_count() const override {
    return static_cast<int64_t>(options_.coefficients.size());
  }

  void prepare(at::TensorList values) override {
    unit_.clear(), inverse_norm_.clear();
    for (const at::Tensor& u : values) {
      inverse_norm_.push_back(u.norm(2, {1}, true).reciprocal());
      unit_.push_back(u * inverse_norm_.back());
    }
  }

  at::Tensor change(const at::Tensor& x, bool) const override {  // H is symmetric
    const at::Tensor blocks = by_block(x, options_.blocks);
    at::Tensor sum;
    for (size_t k = 0; k < unit_.size(); ++k) {
      const at::Tensor along = (blocks * unit_[k]).sum(-1, true).mul_(options_.coefficients[k]);
      sum = sum.defined() ? sum.add_(along * unit_[k]) : along * unit_[k];
    }
    return sum.view(x.sizes());
  }

  /// |sum_k c_k u_k u_k^T|^2 = sum_kl c_k c_l (u_k . u_l)^2 in each block.
  double distance() const override {
    double square = 0;
    for (size_t k = 0; k < unit_.size(); ++k)
      for (size_t l = 0; l < unit_.size(); ++l)
        square += options_.coefficients[k] * options_.coefficients[l] *
                  (unit_[k].to(at::kDouble) * unit_[l]).sum(1).square().sum().item<double>();
    return std::sqrt(std::max(square, 0.0));
  }

  /// With p = x u^ and q = dz u^: du^ = c sum over rows of (p dz + q x), then through u^ = u / |u|.
  std::vector<at::Tensor> gradients(const at::Tensor& dz, const at::Tensor& x) const override {
    const at::Tensor rows_dz = by_block(dz, options_.blocks), rows_x = by_block(x, options_.blocks);
    std::vector<at::Tensor> all;
    for (size_t k = 0; k < unit_.size(); ++k) {
      const at::Tensor p = (rows_x * unit_[k]).sum(-1, true),
                       q = (rows_dz * unit_[k]).sum(-1, true);
      const at::Tensor d_unit =
          (rows_dz * p).add_(rows_x * q).sum(0).mul_(options_.coefficients[k]);
      const at::Tensor along = (d_unit * unit_[k]).sum(-1, true);
      all.push_back((d_unit - along * unit_[k]).mul_(inverse_norm_[k]));
    }
    return all;
  }

 private:
  ReflectionOptions options_;
  std::vector<at::Tensor> unit_, inverse_norm_;  // [blocks, d], [blocks, 1]
};

class Whole : public BlockMap {
 public:
  explicit Whole(const WholeBlocks& options)
      : options_(options), side_(options.width / options.blocks) {}

  std::vector<train::Parameter> initial(const std::string& name, uint64_t) const override {
    at::Tensor start = at::zeros({options_.blocks, side_, side_}, at::kFloat);
    if (!options_.cayley) start.add_(at::eye(side_, at::kFloat));
    return {{name, start, 1.0}};
  }
  int64_t parameter_count() const override { return 1; }

  void prepare(at::TensorList values) override {
    const at::Tensor identity = at::eye(side_, at::kDouble);
    if (!options_.cayley) {
      departure_ = values[0] - identity.to(at::kFloat);
      return;
    }
    const at::Tensor r = values[0].to(at::kDouble);
    const at::Tensor skew = (r - r.transpose(1, 2)) / 2;
    inverse_ = at::linalg_inv(identity - skew);
    departure_ = at::bmm(skew, inverse_).mul_(2).to(at::kFloat);  // (I+S)(I-S)^-1 - I
  }

  at::Tensor change(const at::Tensor& x, bool transposed) const override {
    const at::Tensor blocks = by_block(x, options_.blocks).transpose(0, 1);  // [blocks, rows, d]
    const at::Tensor changed =
        at::bmm(blocks, transposed ? departure_ : departure_.transpose(1, 2));
    return changed.transpose(0, 1).reshape(x.sizes());
  }

  double distance() const override { return departure_.to(at::kDouble).norm().item<double>(); }

  std::vector<at::Tensor> gradients(const at::Tensor& dz, const at::Tensor& x) const override {
    const at::Tensor rows_dz = by_block(dz, options_.blocks), rows_x = by_block(x, options_.blocks);
    const at::Tensor d_block = at::bmm(rows_dz.permute({1, 2, 0}), rows_x.transpose(0, 1));
    if (!options_.cayley) return {d_block};
    // Q = (I+S) M, M = (I-S)^-1: dQ = (I + Q) dS M, and I + Q = 2 M.
    const at::Tensor turned = inverse_.transpose(1, 2);
    const at::Tensor d_skew = at::bmm(at::bmm(turned, d_block.to(at::kDouble)), turned);
    return {(d_skew - d_skew.transpose(1, 2)).to(at::kFloat)};
  }

 private:
  WholeBlocks options_;
  int64_t side_;
  at::Tensor departure_;  // float32 [blocks, d, d]: the blocks without the identity
  at::Tensor inverse_;    // float64, of the Cayley transform
};

}  // namespace

std::unique_ptr<BlockMap> make_reflections(const ReflectionOptions& options) {
  return std::make_unique<Reflections>(options);
}

std::unique_ptr<BlockMap> make_whole_blocks(const WholeBlocks& options) {
  return std::make_unique<Whole>(options);
}

}  // namespace espalier::retrain
