/// LoRA-XS (arXiv 2405.17604): between two frozen bases only R [r, r] is trained. With the
/// truncated W = P Sigma Q^T, dW = s P R^T Sigma Q^T (the paper writes W as in x out: h = x A R B,
/// A = Q Sigma, B = P^T); R ~ N(0, 1e-5^2) at the start.
///
/// A decomposition made anew differs in signs and inside clusters, so the bases belong to the
/// adapter file. Each is computed once, by one worker of one rank, and broadcast.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/linalg/svd.h"
#include "pipeline/random.h"
#include "stages/retrain/added.h"
#include "stages/retrain/start_values.h"

namespace espalier::retrain {

namespace {

constexpr double kStartDeviation = 1e-5;  // of R

struct LoraXsOptions {
  int64_t rank = 16;
  AddedOptions added;
  std::string init = "svd";      ///< svd | svd_random | random
  std::string subspace = "top";  ///< top | middle | bottom singular vectors
  bool sigma = true;             ///< false: the singular values are left out
};

struct Bases {
  at::Tensor down, up;  // float32: Sigma Q^T [r, in] and P [out, r]
};

class LoraXsMatrix : public AddedMatrix {
 public:
  LoraXsMatrix(Target target, const LoraXsOptions& options, Bases bases)
      : AddedMatrix(std::move(target), options.added),
        rank_(options.rank),
        bases_(std::move(bases)) {}

  std::vector<train::Parameter> initial(uint64_t seed) const override {
    const std::string& name = target().name;
    return {
        {name + "/R", normal_start(seed, "lora_xs.R", name, {rank_, rank_}, kStartDeviation), 1.0}};
  }
  NamedTensors frozen() const override {
    return {{target().name + "/down", bases_.down}, {target().name + "/up", bases_.up}};
  }

 protected:
  Terms terms() const override {
    return {bases_.down, linalg::product(bases_.up, values()[0].t(), at::kFloat), {}};
  }
  std::vector<at::Tensor> pull_back(const Terms& gradient) const override {
    return {linalg::product(gradient.up.t(), bases_.up, at::kFloat)};
  }
  bool trains_down() const override { return false; }

 private:
  int64_t rank_;
  Bases bases_;
};

/// The paper's random ablation: A ~ U(+-1/sqrt(r)), B ~ U(+-1/sqrt(out)) in its orientation.
Bases random_bases(const Target& target, int64_t rank, uint64_t seed) {
  const int64_t rows = target.weight.size(0), columns = target.weight.size(1);
  const auto bound = [](int64_t width) { return 1.0 / std::sqrt(static_cast<double>(width)); };
  return {uniform_start(seed, "lora_xs.down", target.name, {rank, columns}, bound(rank)),
          uniform_start(seed, "lora_xs.up", target.name, {rows, rank}, bound(rows))};
}

Bases make_bases(const Target& target, const LoraXsOptions& options, uint64_t seed) {
  const int64_t rank = options.rank;
  if (options.init == "random") return random_bases(target, rank, seed);
  const int64_t rows = target.weight.size(0), columns = target.weight.size(1);
  const at::Tensor matrix =
      options.init == "svd" ? target.weight.to(at::kFloat)
                            : uniform_start(seed, "lora_xs.matrix", target.name, {rows, columns},
                                            1.0 / std::sqrt(static_cast<double>(columns)));
  const linalg::Svd svd = options.subspace == "top"
                              ? linalg::truncated_svd(matrix, rank, stream_of(target.name))
                              : linalg::full_svd(matrix);
  const int64_t spare = svd.s.numel() - rank;
  const int64_t first = options.subspace == "middle" ? spare / 2 : spare;
  const at::Tensor q = svd.v.narrow(1, first, rank), s = svd.s.narrow(0, first, rank);
  const at::Tensor down = options.sigma ? (q * s).t() : q.t();
  return {down.to(at::kFloat).contiguous(),
          svd.u.narrow(1, first, rank).to(at::kFloat).contiguous()};
}

class LoraXsMethod : public AdapterMethod {
 public:
  explicit LoraXsMethod(const LoraXsOptions& options) : options_(options) {}

  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    check_rank(matrix, rows, columns, options_.rank);
  }
  nlohmann::json settings() const override {
    return {{"adapter_rank", options_.rank},
            {"scale", options_.added.scale},
            {"subspace", options_.subspace},
            {"sigma", options_.sigma}};
  }
  int64_t trainable_parameters(int64_t, int64_t) const override {
    return options_.rank * options_.rank;
  }
  bool additive() const override { return true; }
  std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                  const AttachOptions& options) const override;

 private:
  std::vector<Bases> bases_of(const std::vector<Target>& targets,
                              const AttachOptions& options) const;

  LoraXsOptions options_;
};

/// Matrix t on rank t mod ranks: a model's blocks are alike, so that is balanced.
std::vector<Bases> LoraXsMethod::bases_of(const std::vector<Target>& targets,
                                          const AttachOptions& options) const {
  const int64_t ranks = options.group ? options.group->size() : 1;
  const int64_t rank = options.group ? options.group->rank() : 0;
  std::vector<Bases> bases(targets.size());
  std::vector<int64_t> mine;
  for (int64_t t = rank; t < static_cast<int64_t>(targets.size()); t += ranks) mine.push_back(t);
  const auto compute = [&](int64_t i, int) {
    bases[mine[i]] = make_bases(targets[mine[i]], options_, options.seed);
  };
  if (options.workers)
    options.workers->for_each(static_cast<int64_t>(mine.size()), compute);
  else
    for (size_t i = 0; i < mine.size(); ++i) compute(static_cast<int64_t>(i), 0);
  for (size_t t = 0; options.group && t < targets.size(); ++t) {
    const at::Tensor& weight = targets[t].weight;
    if (!bases[t].up.defined())
      bases[t] = {at::empty({options_.rank, weight.size(1)}, at::kFloat),
                  at::empty({weight.size(0), options_.rank}, at::kFloat)};
    for (const at::Tensor& base : {bases[t].down, bases[t].up})
      options.group->broadcast(
          comm::bytes_of(std::span(base.data_ptr<float>(), static_cast<size_t>(base.numel()))),
          static_cast<int>(t % static_cast<size_t>(ranks)));
  }
  return bases;
}

std::unique_ptr<Adapter> LoraXsMethod::attach(std::vector<Target> targets,
                                              const AttachOptions& options) const {
  for (const Target& t : targets) check(t.name, t.weight.size(0), t.weight.size(1));
  std::vector<Bases> bases;
  for (const Target& t : targets) {
    const at::Tensor* down =
        frozen_tensor(options, t.name + "/down", at::kFloat, {options_.rank, t.weight.size(1)});
    const at::Tensor* up =
        frozen_tensor(options, t.name + "/up", at::kFloat, {t.weight.size(0), options_.rank});
    if (down && up) bases.push_back({down->contiguous(), up->contiguous()});
  }
  if (options.frozen.empty()) bases = bases_of(targets, options);
  std::vector<std::unique_ptr<AdaptedMatrix>> matrices;
  for (size_t t = 0; t < targets.size(); ++t)
    matrices.push_back(
        std::make_unique<LoraXsMatrix>(std::move(targets[t]), options_, std::move(bases[t])));
  return make_matrix_adapter(std::move(matrices));
}

/// Stated, or alpha / r, which ranks of a sweep can share.
double scale_of(const config::Section& section, int64_t rank) {
  const auto scale = section.optional_number("scale", {.low = 0, .low_open = true});
  const auto alpha = section.optional_number("alpha", {.low = 0, .low_open = true});
  if (scale && alpha)
    section.fail("scale", "is alpha / adapter_rank where alpha is set; set one to null");
  return alpha ? *alpha / static_cast<double>(rank) : scale.value_or(1);
}

std::unique_ptr<AdapterMethod> read_lora_xs(const config::Section& section) {
  LoraXsOptions options;
  options.rank = section.integer_or("adapter_rank", options.rank, {.low = 1});
  options.added.scale = scale_of(section, options.rank);
  options.added.dropout = section.number_or("dropout", 0, {.low = 0, .high = 1, .high_open = true});
  options.init = section.choice("init", {"svd", "svd_random", "random"});
  options.subspace = section.choice("subspace", {"top", "middle", "bottom"});
  options.sigma = section.flag_or("sigma", true);
  if (options.init == "random" && options.subspace != "top")
    section.fail("subspace", "init=random has no singular vectors to choose from; set it to top");
  if (options.init == "random" && !options.sigma)
    section.fail("sigma", "init=random has no singular values to leave out; set it to true");
  return std::make_unique<LoraXsMethod>(options);
}

const AdapterRegistration registration{
    "lora_xs",
    read_lora_xs,
    {"adapter_rank", "scale", "alpha", "dropout", "init", "subspace", "sigma"}};

}  // namespace

}  // namespace espalier::retrain
