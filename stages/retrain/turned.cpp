#include "stages/retrain/turned.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "stages/retrain/dropout.h"

namespace espalier::retrain {

namespace {

class TurnedMatrix : public AdaptedMatrix {
 public:
  TurnedMatrix(Target target, double dropout, std::unique_ptr<BlockMap> input,
               std::unique_ptr<BlockMap> output)
      : AdaptedMatrix(std::move(target)),
        dropout_(dropout),
        input_(std::move(input)),
        output_(std::move(output)) {}

  std::vector<train::Parameter> initial(uint64_t seed) const override;
  void prepare() override;
  at::Tensor forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const override;
  Gradients backward(const at::Tensor& dy, const Saved& saved, const UnitKey& key,
                     bool x_wanted) const override;
  at::Tensor merged() const override;
  std::vector<double> map_distances() const override {
    std::vector<double> distances;
    for (const BlockMap* map : {input_.get(), output_.get()})
      if (map) distances.push_back(map->distance());
    return distances;
  }

 private:
  bool masked() const { return target().kept.defined(); }
  at::Tensor dropped(const at::Tensor& x, const UnitKey& key) const {
    return dropout_ > 0 ? dropout(x, dropout_, key, target().name) : x;
  }
  at::Tensor turned_inputs() const;  // W H_in, float32
  Gradients backward_masked(const at::Tensor& dy, const at::Tensor& read) const;
  Gradients backward_free(const at::Tensor& dy, const Saved& saved) const;

  double dropout_;
  std::unique_ptr<BlockMap> input_, output_;  // one may be absent
  at::Tensor effective_;                      // masked: (H_out W H_in) * kept, in the model's type
};

/// x + change, rounded once to x's type.
at::Tensor plus(const at::Tensor& x, const at::Tensor& change) {
  return change.add(x).to(x.scalar_type());
}

std::vector<train::Parameter> TurnedMatrix::initial(uint64_t seed) const {
  std::vector<train::Parameter> all;
  if (input_) all = input_->initial(target().name + "/input", seed);
  if (output_)
    for (train::Parameter& parameter : output_->initial(target().name + "/output", seed))
      all.push_back(std::move(parameter));
  return all;
}

void TurnedMatrix::prepare() {
  const int64_t inputs = input_ ? input_->parameter_count() : 0;
  if (input_) input_->prepare(at::TensorList(values()).slice(0, inputs));
  if (output_) output_->prepare(at::TensorList(values()).slice(inputs));
  if (masked()) effective_ = merged();
}

at::Tensor TurnedMatrix::turned_inputs() const {
  const at::Tensor w = target().weight.to(at::kFloat);
  return input_ ? input_->change(w, true).add_(w) : w;
}

at::Tensor TurnedMatrix::merged() const {
  const at::Tensor inner = turned_inputs();
  const at::Tensor whole =
      output_ ? output_->change(inner.t(), false).t().add(inner).contiguous() : inner;
  return sum_inside(target().weight, whole, target().kept, false);
}

at::Tensor TurnedMatrix::forward(const at::Tensor& x, const UnitKey& key, Saved& saved) const {
  const at::Tensor read = dropped(x, key);
  saved = {read};
  if (masked()) return linalg::product(read, effective_.t(), type());
  const at::Tensor turned = input_ ? plus(read, input_->change(read, false)) : read;
  at::Tensor y = linalg::product(turned, target().weight.t(), type());
  if (!output_) return y;
  saved.push_back(y);
  return plus(y, output_->change(y, false));
}

AdaptedMatrix::Gradients TurnedMatrix::backward_masked(const at::Tensor& dy,
                                                       const at::Tensor& read) const {
  Gradients gradients;
  const at::Tensor g = weight_gradient(dy, read, target().kept);  // of H_out W H_in
  std::vector<at::Tensor> of_output;
  at::Tensor inner_gradient = g;
  if (output_) {
    of_output = output_->gradients(g.t(), turned_inputs().t());
    inner_gradient = output_->change(g.t(), true).t().add(g);
  }
  // A row of W H_in is H_in^T w: the map's gradient is that of its transpose, turned around.
  if (input_) gradients.parameters = input_->gradients(target().weight, inner_gradient);
  for (at::Tensor& gradient : of_output) gradients.parameters.push_back(std::move(gradient));
  gradients.x = linalg::product(dy, effective_, type());
  return gradients;
}

AdaptedMatrix::Gradients TurnedMatrix::backward_free(const at::Tensor& dy,
                                                     const Saved& saved) const {
  Gradients gradients;
  const at::Tensor inner = output_ ? plus(dy, output_->change(dy, true)) : dy;
  const at::Tensor turned = linalg::product(inner, target().weight, type());
  if (input_) gradients.parameters = input_->gradients(turned, saved[0]);
  if (output_)
    for (at::Tensor& gradient : output_->gradients(dy, saved[1]))
      gradients.parameters.push_back(std::move(gradient));
  gradients.x = input_ ? plus(turned, input_->change(turned, true)) : turned;
  return gradients;
}

AdaptedMatrix::Gradients TurnedMatrix::backward(const at::Tensor& dy, const Saved& saved,
                                                const UnitKey& key, bool x_wanted) const {
  Gradients gradients = masked() ? backward_masked(dy, saved[0]) : backward_free(dy, saved);
  if (x_wanted)
    gradients.x = dropped(gradients.x, key);
  else
    gradients.x.reset();
  return gradients;
}

}  // namespace

TurnedOptions read_turned_options(const config::Section& section, const TurnedOptions& defaults) {
  TurnedOptions options = defaults;
  const std::string side = section.choice("side", {"input", "output", "both"});
  options.input = side != "output";
  options.output = side != "input";
  options.blocks = section.integer_or("blocks", options.blocks, {.low = 1});
  options.dropout =
      section.number_or("dropout", options.dropout, {.low = 0, .high = 1, .high_open = true});
  return options;
}

void TurnedMethod::check(const std::string& matrix, int64_t rows, int64_t columns) const {
  const auto fits = [&](bool turned, int64_t width, const char* what) {
    if (turned && width % options_.blocks != 0)
      throw UserError(fmt::format(
          "{} [{}, {}]: retrain.blocks = {} does not divide its {} {}; choose a divisor or leave "
          "the matrix out of retrain.targets",
          matrix, rows, columns, options_.blocks, width, what));
  };
  fits(options_.input, columns, "inputs");
  fits(options_.output, rows, "outputs");
}

int64_t TurnedMethod::trainable_parameters(int64_t rows, int64_t columns) const {
  return (options_.input ? parameters_of_side(columns) : 0) +
         (options_.output ? parameters_of_side(rows) : 0);
}

nlohmann::json TurnedMethod::settings() const {
  const char* side = !options_.output ? "input" : options_.input ? "both" : "output";
  return {{"side", side}, {"blocks", options_.blocks}};
}

std::unique_ptr<AdaptedMatrix> TurnedMethod::make(Target target, const AttachOptions&) const {
  auto input = options_.input ? map(target, target.weight.size(1)) : nullptr;
  auto output = options_.output ? map(target, target.weight.size(0)) : nullptr;
  return std::make_unique<TurnedMatrix>(std::move(target), options_.dropout, std::move(input),
                                        std::move(output));
}

}  // namespace espalier::retrain
