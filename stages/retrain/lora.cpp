/// LoRA (arXiv 2106.09685), y = x (W + alpha/r B A)^T with A [r, in] uniform and B [out, r] = 0 at
/// the start, and what becomes of it on a pruned matrix:
///   lora         with merge: masked trains inside the mask as lora_masked; otherwise fills zeros
///   lora_masked  y = x ((W + alpha/r B A) * M)^T in training as in the merge
///   lora_star    trained without the mask, which is applied once, at the merge (the baseline of
///                SPP, arXiv 2405.16057)

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "stages/retrain/added.h"
#include "stages/retrain/start_values.h"

namespace espalier::retrain {

namespace {

struct LoraOptions {
  int64_t rank = 8;
  double alpha = 16;
  AddedOptions added;
};

class LoraMatrix : public AddedMatrix {
 public:
  LoraMatrix(Target target, const LoraOptions& options)
      : AddedMatrix(std::move(target), options.added), rank_(options.rank) {}

  std::vector<train::Parameter> initial(uint64_t seed) const override {
    const std::string& name = target().name;
    const double bound = 1.0 / std::sqrt(static_cast<double>(columns()));
    return {{name + "/A", uniform_start(seed, "lora.A", name, {rank_, columns()}, bound), 1.0},
            {name + "/B", at::zeros({rows(), rank_}, at::kFloat), 1.0}};
  }

 protected:
  Terms terms() const override { return {values()[0], values()[1], {}}; }
  std::vector<at::Tensor> pull_back(const Terms& gradient) const override {
    return {gradient.down, gradient.up};
  }

 private:
  int64_t rank_;
};

class LoraMethod : public MatrixMethod {
 public:
  explicit LoraMethod(const LoraOptions& options) : options_(options) {}

  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    check_rank(matrix, rows, columns, options_.rank);
  }
  nlohmann::json settings() const override {
    return {{"adapter_rank", options_.rank}, {"alpha", options_.alpha}};
  }
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override {
    return options_.rank * (rows + columns);
  }
  bool additive() const override { return true; }

 protected:
  std::unique_ptr<AdaptedMatrix> make(Target target, const AttachOptions&) const override {
    return std::make_unique<LoraMatrix>(std::move(target), options_);
  }

 private:
  LoraOptions options_;
};

LoraOptions read_options(const config::Section& section) {
  LoraOptions options;
  options.rank = section.integer_or("adapter_rank", options.rank, {.low = 1});
  options.alpha = section.number_or("alpha", options.alpha, {.low = 0, .low_open = true});
  options.added.scale = options.alpha / static_cast<double>(options.rank);
  options.added.dropout = section.number_or("dropout", 0, {.low = 0, .high = 1, .high_open = true});
  return options;
}

std::unique_ptr<AdapterMethod> read_lora(const config::Section& section) {
  return std::make_unique<LoraMethod>(read_options(section));
}

void require_masked(const config::Section& section, const std::string& method) {
  const std::string merge = section.text_or("merge", "masked");
  if (merge != "masked")
    section.fail("merge", fmt::format("'{}' contradicts method {}, which ends inside the mask; "
                                      "choose masked, or method lora",
                                      merge, method));
}

std::unique_ptr<AdapterMethod> read_lora_masked(const config::Section& section) {
  require_masked(section, "lora_masked");
  return read_lora(section);
}

std::unique_ptr<AdapterMethod> read_lora_star(const config::Section& section) {
  require_masked(section, "lora_star");
  LoraOptions options = read_options(section);
  options.added.mask_at_merge_only = true;
  return std::make_unique<LoraMethod>(options);
}

const std::vector<std::string> kKeys = {"adapter_rank", "alpha", "dropout"};
const AdapterRegistration lora{"lora", read_lora, kKeys};
const AdapterRegistration lora_masked{"lora_masked", read_lora_masked, kKeys};
const AdapterRegistration lora_star{"lora_star", read_lora_star, kKeys};

}  // namespace

}  // namespace espalier::retrain
