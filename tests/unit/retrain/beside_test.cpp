// What stays beside a matrix: written, read, applied, gone on from, and merged later.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "stages/retrain/difference.h"
#include "stages/retrain/merge.h"
#include "tests/unit/retrain/tiny_llama.h"

namespace espalier::retrain {
namespace {

/// y = x (W + 2 up down + S)^T + bias with everything trained: the most general sum.
class Sum : public Adapter {
 public:
  explicit Sum(std::vector<Target> targets) : targets_(std::move(targets)) {}
  std::vector<train::Parameter> initial_parameters(uint64_t seed) const override {
    std::vector<train::Parameter> all;
    for (const Target& t : targets_) {
      const auto random = [&](const char* part, at::IntArrayRef shape) {
        at::Tensor out = at::empty(shape);
        const CounterRandom numbers(seed, part, stream_of(t.name));
        for (int64_t i = 0; i < out.numel(); ++i)
          out.data_ptr<float>()[i] = static_cast<float>(0.1 * numbers.normal(i));
        all.push_back({t.name + "/" + part, out, 1.0});
      };
      random("down", {2, t.weight.size(1)});
      random("up", {t.weight.size(0), 2});
      random("values", {3});
      random("bias", {t.weight.size(0)});
    }
    return all;
  }
  void bind(const train::ParameterSet& parameters) override {
    for (size_t t = 0; t < targets_.size(); ++t) {
      const auto part = [&](size_t i) { return parameters.parameters()[4 * t + i].value; };
      terms_.push_back({part(0).detach(), part(1).detach(), 2.0,
                        at::tensor({int64_t{1}, int64_t{40}, int64_t{70}}, at::kLong),
                        part(2).detach(), part(3).detach()});
    }
  }
  void prepare_step(Workers&) override {}
  at::Tensor apply(int64_t t, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                   const UnitKey&) const override {
    return at::matmul(x, dense(t).t()).to(x.scalar_type()) + terms_[t].bias +
           (bias ? *bias : at::zeros({1}));
  }
  std::vector<int64_t> parameters_of(int64_t t) const override {
    return {4 * t, 4 * t + 1, 4 * t + 2, 4 * t + 3};
  }
  at::Tensor merged(int64_t t) const override {
    return dense(t).to(targets_[t].weight.scalar_type());
  }
  std::optional<model::AddedTerms> beside(int64_t t) const override { return terms_[t]; }

 private:
  at::Tensor dense(int64_t t) const {
    at::Tensor w = targets_[t].weight.to(at::kFloat) + 2 * at::matmul(terms_[t].up, terms_[t].down);
    w.view({-1}).index_add_(0, terms_[t].positions, terms_[t].values);
    return w;
  }
  std::vector<Target> targets_;
  std::vector<model::AddedTerms> terms_;
};

class SumMethod : public AdapterMethod {
 public:
  void check(const std::string&, int64_t, int64_t) const override {}
  nlohmann::json settings() const override { return nlohmann::json::object(); }
  std::unique_ptr<Adapter> attach(std::vector<Target> targets,
                                  const AttachOptions&) const override {
    return std::make_unique<Sum>(std::move(targets));
  }
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override {
    return 2 * columns + 3 * rows + 3;
  }
  bool additive() const override { return true; }
};

struct Tiny {
  std::filesystem::path directory;
  std::optional<io::Checkpoint> checkpoint;
  model::Architecture architecture;
  std::optional<data::TrainingSampler> sampler;
  Workers workers{1};
  comm::Communicator self = comm::Communicator::self();

  explicit Tiny(const std::string& name)
      : directory(std::filesystem::path(testing::TempDir()) / ("beside_" + name)) {
    std::filesystem::remove_all(directory);
    write_tiny_llama(directory);
    write_tiny_text(directory / "text.h5");
    checkpoint = io::Checkpoint::open(directory);
    architecture = model::read_architecture(*checkpoint);
    sampler.emplace(data::TokenSet::open(directory / "text.h5"), 1, 24, true);
  }
  struct Made {
    std::unique_ptr<AdaptedModel> model;
    std::unique_ptr<train::ParameterSet> parameters;
  };
  Made make(const io::Checkpoint& base, uint64_t seed, bool without_terms = false) const {
    ModelOptions options(std::vector<std::string>{"q_proj", "v_proj", "down_proj"});
    options.without_terms = without_terms;
    options.attach.merge = Merge::beside;
    auto model =
        std::make_unique<AdaptedModel>(base, architecture, at::kFloat, SumMethod(), options);
    auto parameters = model->make_parameters(seed);
    return {std::move(model), std::move(parameters)};
  }
  double loss(const AdaptedModel& model) const {
    return model.evaluate(sampler->batch(0, 2), {1, 0, 0, 2}).loss.loss;
  }
  Difference difference(const AdaptedModel& model, const std::filesystem::path& written) {
    return difference_to_written(model, written, {sampler->batch(0, 1), sampler->batch(1, 1)}, 1,
                                 workers, self);
  }
};

TEST(Beside, TheWrittenTermsActAsTheAdapterAndTheMatricesStay) {
  Tiny tiny("acts");
  const auto made = tiny.make(*tiny.checkpoint, 3);
  const auto out = tiny.directory / "beside";
  const MergeReport report =
      write_model(out, *tiny.checkpoint, *made.model, Merge::beside, tiny.workers, tiny.self);
  EXPECT_EQ(report.filled, 0);
  EXPECT_GT(report.nonzeros_after, report.nonzeros_before);
  const io::Checkpoint written = io::Checkpoint::open(out);
  EXPECT_EQ(model::matrices_with_terms(written).size(), 3u * kBlocks);
  for (const std::string& name : tiny.checkpoint->names())
    EXPECT_TRUE(at::equal(written.view(name), tiny.checkpoint->view(name))) << name;
  const Difference difference = tiny.difference(*made.model, out);
  EXPECT_LT(difference.largest_logit, 1e-3);
  EXPECT_LT(difference.mean_kl, 1e-6);
  EXPECT_EQ(difference.positions, 48);
}

TEST(Beside, MergingDenseFillsZerosAndGivesTheSameModel) {
  Tiny tiny("dense");
  const auto made = tiny.make(*tiny.checkpoint, 3);
  Adapter& adapter = made.model->adapter();
  const auto out = tiny.directory / "dense";
  EXPECT_THROW(write_model(tiny.directory / "masked", *tiny.checkpoint, *made.model, Merge::masked,
                           tiny.workers, tiny.self),
               DefectError);  // the adapter fills zeros: nobody writes that as masked
  const MergeReport report =
      write_model(out, *tiny.checkpoint, *made.model, Merge::dense, tiny.workers, tiny.self);
  EXPECT_GT(report.share_filled(), 0.9);
  EXPECT_TRUE(
      at::equal(io::Checkpoint::open(out).view(made.model->targets()[0].name), adapter.merged(0)));
  EXPECT_GT(tiny.difference(*made.model, out).largest_logit, 1e-3);  // the biases have no place
}

TEST(Beside, ASecondAdapterIsAddedAndOneGoneOnFromReplacesItsTerms) {
  Tiny tiny("second");
  const auto first = tiny.make(*tiny.checkpoint, 3);
  const auto one = tiny.directory / "one", two = tiny.directory / "two";
  write_model(one, *tiny.checkpoint, *first.model, Merge::beside, tiny.workers, tiny.self);
  const io::Checkpoint with_terms = io::Checkpoint::open(one);

  const auto added = tiny.make(with_terms, 4);
  EXPECT_NE(tiny.loss(*added.model), tiny.loss(*tiny.make(*tiny.checkpoint, 4).model));
  write_model(two, with_terms, *added.model, Merge::beside, tiny.workers, tiny.self);
  EXPECT_LT(tiny.difference(*added.model, two).largest_logit, 1e-3);

  const auto going_on = tiny.make(with_terms, 3, /*without_terms=*/true);
  EXPECT_EQ(tiny.loss(*going_on.model), tiny.loss(*first.model));
  const auto three = tiny.directory / "three", four = tiny.directory / "four";
  write_model(three, with_terms, *going_on.model, Merge::beside, tiny.workers, tiny.self);
  EXPECT_LT(tiny.difference(*first.model, three).largest_logit, 1e-3);
  write_model(four, with_terms, *going_on.model, Merge::dense, tiny.workers, tiny.self);
  EXPECT_TRUE(model::matrices_with_terms(io::Checkpoint::open(four)).empty());
}

TEST(Beside, TermsAreTheDenseMatrixTheyStandFor) {
  at::manual_seed(5);
  const at::Tensor x = at::randn({6, 10}), weight = at::randn({8, 10});
  const model::AddedTerms terms{at::randn({3, 10}),
                                at::randn({8, 3}),
                                0.7,
                                at::tensor({int64_t{0}, int64_t{33}, int64_t{33}}, at::kLong),
                                at::randn({3}),
                                at::randn({8})};
  at::Tensor dense = weight.to(at::kDouble) +
                     0.7 * at::matmul(terms.up.to(at::kDouble), terms.down.to(at::kDouble));
  dense.view({-1}).index_add_(0, terms.positions, terms.values.to(at::kDouble));
  const at::Tensor wanted = at::matmul(x.to(at::kDouble), dense.t()) + terms.bias;
  const at::Tensor y =
      model::add_terms(model::prepared_terms(terms, at::kFloat), x, linalg::linear(x, weight));
  EXPECT_LT((y - wanted).abs().max().item<double>(), 2e-5);
  const at::Tensor twice =
      model::add_terms(model::prepared_terms(model::sum_of_terms(terms, terms), at::kFloat), x,
                       linalg::linear(x, weight));
  const at::Tensor base = at::matmul(x.to(at::kDouble), weight.to(at::kDouble).t());
  EXPECT_LT((twice - (base + 2 * (wanted - base))).abs().max().item<double>(), 4e-5);
}

TEST(Beside, TermsThatDoNotFitTheirMatrixAreRefused) {
  Tiny tiny("hostile");
  const std::string matrix = "model.layers.0.self_attn.q_proj.weight";
  model::AddedTerms terms{at::randn({2, kHidden}),
                          at::randn({kHidden, 2}),
                          1.0,
                          at::tensor({int64_t{kHidden * kHidden}}, at::kLong),
                          at::ones({1}),
                          {}};
  const auto refused = [&](const std::string& name, const model::AddedTerms& bad) {
    const auto out = tiny.directory / name;
    io::write_safetensors(out / "terms.safetensors",
                          model::stored_terms(matrix, bad, kHidden, kHidden));
    io::write_derived(out, *tiny.checkpoint);
    const io::Checkpoint written = io::Checkpoint::open(out);
    EXPECT_THROW(model::load_terms(written, matrix, kHidden, kHidden), UserError) << name;
  };
  std::filesystem::create_directories(tiny.directory / "outside");
  refused("outside", terms);
  terms.positions.fill_(0);
  terms.up = at::randn({kHidden, 3});
  refused("ranks", terms);
  terms.up = at::full({kHidden, 2}, INFINITY);
  refused("infinite", terms);
}

}  // namespace
}  // namespace espalier::retrain
