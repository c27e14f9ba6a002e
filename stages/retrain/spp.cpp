#include "stages/retrain/spp.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "stages/retrain/adapted_matrix.h"
#include "stages/retrain/dropout.h"
#include "stages/retrain/spp_kernels.h"
#include "stages/retrain/start_values.h"

namespace espalier::retrain {

namespace {

class SppScales : public AdaptedMatrix {
 public:
  SppScales(Target target, const SppOptions& options)
      : AdaptedMatrix(std::move(target)),
        options_(options),
        effective_(at::empty_like(this->target().weight)) {}

  std::vector<train::Parameter> initial(uint64_t seed) const override;
  void prepare() override { write_effective(holds_weight() ? 1.0f : 0.0f, effective_); }
  at::Tensor forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const override;
  Gradients backward(const at::Tensor& dy, const Saved& saved, const UnitKey& key,
                     bool x_wanted) const override;
  at::Tensor merged() const override {
    at::Tensor out = at::empty_like(target().weight);
    write_effective(options_.residual ? 1.0f : 0.0f, out);
    return out;
  }

 private:
  /// Whether W is part of what is formed once a step; otherwise that is s W' alone.
  bool holds_weight() const { return options_.residual && options_.dropout == 0; }
  float scale() const { return options_.residual ? static_cast<float>(options_.scale) : 1.0f; }
  SppMatrix matrix() const {
    return {target().weight.const_data_ptr(),
            type() == at::kBFloat16,
            rows(),
            columns(),
            options_.groups,
            values()[0].const_data_ptr<float>(),
            options_.beta ? values()[1].const_data_ptr<float>() : nullptr};
  }
  /// W * (base + s repeat(alpha) beta).
  void write_effective(float base, at::Tensor& out) const {
    spp_effective(matrix(), base, scale(), out.data_ptr());
  }

  SppOptions options_;
  at::Tensor effective_;  // in the model's type
};

std::vector<train::Parameter> SppScales::initial(uint64_t seed) const {
  const std::string& name = target().name;
  // Both bounds are 1/sqrt(fan in): alpha reads `columns` inputs, beta one.
  at::Tensor alpha = uniform_start(seed, "spp.alpha", name, {options_.groups, columns()},
                                   1.0 / std::sqrt(static_cast<double>(columns())));
  if (!options_.residual || (!options_.beta && !options_.random_init))
    alpha.fill_(options_.residual ? 0.0 : 1.0);
  if (!options_.beta) return {{name + "/alpha", alpha, 1.0}};
  at::Tensor beta = uniform_start(seed, "spp.beta", name, {rows()}, 1.0);
  if (!options_.residual || !options_.random_init) beta.fill_(options_.residual ? 0.0 : 1.0);
  return {{name + "/alpha", alpha, 1.0}, {name + "/beta", beta, 1.0}};
}

at::Tensor SppScales::forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const {
  const bool drops = options_.dropout > 0;
  const at::Tensor read = drops ? dropout(x, options_.dropout, key, target().name) : x;
  saved = {read};
  const at::Tensor y = linalg::product(read, effective_.t(), type());
  if (holds_weight() || !options_.residual) return y;
  return linalg::product(x, target().weight.t(), type()).add_(y);
}

AdaptedMatrix::Gradients SppScales::backward(const at::Tensor& dy, const Saved& saved,
                                             const UnitKey& key, bool x_wanted) const {
  Gradients gradients;
  if (x_wanted) {
    gradients.x = linalg::product(dy, effective_, type());
    if (options_.dropout > 0)
      gradients.x = dropout(gradients.x, options_.dropout, key, target().name);
    if (options_.residual && !holds_weight())
      gradients.x.add_(linalg::product(dy, target().weight, type()));
  }
  const at::Tensor g = linalg::product(dy.t(), saved[0], at::kFloat);
  for (const at::Tensor& value : values())
    gradients.parameters.push_back(at::empty(value.sizes(), at::kFloat));
  spp_reduce(matrix(), g.const_data_ptr<float>(), scale(),
             gradients.parameters[0].data_ptr<float>(),
             options_.beta ? gradients.parameters[1].data_ptr<float>() : nullptr);
  return gradients;
}

class SppMethod : public MatrixMethod {
 public:
  explicit SppMethod(const SppOptions& options) : options_(options) {}

  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    if (rows % options_.groups != 0)
      throw UserError(
          fmt::format("{} [{}, {}]: retrain.row_groups = {} does not divide its {} rows; choose a "
                      "divisor or leave the matrix out of retrain.targets",
                      matrix, rows, columns, options_.groups, rows));
  }
  bool needs_kept() const override { return false; }
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override {
    return options_.groups * columns + (options_.beta ? rows : 0);
  }
  nlohmann::json settings() const override {
    return {{"row_groups", options_.groups},
            {"scale", options_.scale},
            {"beta", options_.beta},
            {"residual", options_.residual}};
  }

 protected:
  std::unique_ptr<AdaptedMatrix> make(Target target, const AttachOptions&) const override {
    return std::make_unique<SppScales>(std::move(target), options_);
  }

 private:
  SppOptions options_;
};

std::unique_ptr<AdapterMethod> read_spp(const config::Section& section) {
  SppOptions options;
  options.groups = section.integer_or("row_groups", options.groups, {.low = 1});
  options.scale = section.number_or("scale", options.scale, {.low = 0, .low_open = true});
  options.dropout =
      section.number_or("dropout", options.dropout, {.low = 0, .high = 1, .high_open = true});
  options.beta = section.flag_or("beta", options.beta);
  options.residual = section.flag_or("residual", options.residual);
  const std::string init = section.text_or("init", "zero");
  if (init != "zero" && init != "random")
    section.fail("init", fmt::format("'{}' is none of zero, random", init));
  options.random_init = init == "random";
  if (!options.residual && options.random_init)
    section.fail("init", "residual: false trains from ones; set init to zero");
  return make_spp(options);
}

const AdapterRegistration registration{
    "spp", read_spp, {"row_groups", "scale", "dropout", "beta", "residual", "init"}};

}  // namespace

std::unique_ptr<AdapterMethod> make_spp(const SppOptions& options) {
  return std::make_unique<SppMethod>(options);
}

}  // namespace espalier::retrain
