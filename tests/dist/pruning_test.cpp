#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "pipeline/linalg/factor.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"
#include "stages/prune/alps.h"
#include "stages/prune/dsnot.h"
#include "stages/prune/matrix_pruning.h"
#include "tests/unit/prune/judged_model.h"

namespace espalier::prune {
namespace {

using comm::Communicator;

at::Tensor normals(const std::string& purpose, int64_t rows, int64_t columns) {
  const CounterRandom random(23, purpose);
  at::Tensor t = at::empty({rows, columns}, at::kFloat);
  for (int64_t i = 0; i < rows * columns; ++i)
    t.data_ptr<float>()[i] = static_cast<float>(random.normal(i));
  return t;
}

// Rounded weights: ties cross tiles and ranks.
std::vector<MatrixTask> block_of_matrices(const Pattern& pattern) {
  std::vector<MatrixTask> tasks;
  const auto add = [&](const std::string& name, int64_t rows, int64_t columns, int64_t statistic) {
    const at::Tensor weight = at::round(normals(name, rows, columns) * 16) / 16;
    tasks.push_back({name, weight, statistic, at::zeros({rows, columns}, at::kByte), pattern});
  };
  add("q_proj", 320, 160, 0);
  add("k_proj", 100, 160, 0);
  add("gate_proj", 513, 160, 1);
  add("down_proj", 160, 512, 2);
  return tasks;
}

struct Statistics {
  std::vector<at::Tensor> factors;
  std::vector<std::vector<float>> norms;
  std::vector<std::vector<int64_t>> dead;
  std::vector<AlpsInput> alps;
  std::vector<InputStatistics> inputs;  // for DSnoT
};

Statistics statistics() {
  Statistics result;
  for (const int64_t columns : {160, 160, 512}) {
    at::Tensor x = normals(fmt::format("tokens {}", result.factors.size()), 2 * columns, columns);
    x.select(1, 7).zero_();
    at::Tensor gram = at::mm(x.t(), x).to(at::kDouble);
    const at::Tensor norm = gram.diagonal().sqrt().to(at::kFloat);
    result.norms.emplace_back(norm.data_ptr<float>(), norm.data_ptr<float>() + columns);
    const ScaledGram scaled = scale_gram(gram.clone(), 0.01, "test");
    const auto [values, vectors] = at::linalg_eigh(scaled.gram);
    result.alps.push_back(
        {solver_gram(scaled), vectors.to(at::kFloat).contiguous(), values.to(at::kFloat)});
    InputStatistics input;
    input.norms = result.norms.back();
    for (int64_t j = 0; j < columns; ++j) {
      input.means.push_back(static_cast<float>(j % 7) - 3);
      input.variances.push_back(1 + static_cast<float>(j % 3));
    }
    result.inputs.push_back(input);
    linalg::FactorReport report;
    result.factors.push_back(linalg::inverse_factor(gram, 0.01, "test", report));
    result.dead.push_back(report.dead_inputs);
  }
  return result;
}

using Method = void (*)(std::vector<MatrixTask>&, const Statistics&, Workers&, const Communicator&);

void magnitude(std::vector<MatrixTask>& tasks, const Statistics&, Workers& workers,
               const Communicator& group) {
  prune_magnitude(tasks, true, workers, group);
  gather_rows(tasks, false, group);
}

void wanda(std::vector<MatrixTask>& tasks, const Statistics& s, Workers& workers,
           const Communicator& group) {
  prune_wanda(tasks, s.norms, true, workers, group);
  gather_rows(tasks, false, group);
}

void sparsegpt(std::vector<MatrixTask>& tasks, const Statistics& s, Workers& workers,
               const Communicator& group) {
  prune_sparsegpt(tasks, s.factors, s.dead, 128, true, workers, group);
  gather_rows(tasks, true, group);
}

void cumulative_wanda(std::vector<MatrixTask>& tasks, const Statistics& s, Workers& workers,
                      const Communicator& group) {
  for (MatrixTask& task : tasks) task.pattern = {0, 0, task.pattern.sparsity};
  prune_wanda_cumulative(tasks, s.norms, true, workers, group);
  gather_rows(tasks, false, group);
}

void alps(std::vector<MatrixTask>& tasks, const Statistics& s, Workers& workers,
          const Communicator& group) {
  AlpsOptions options;
  options.iterations = 24;
  tasks[1].pattern = {0, 0, 0.55};  // one that no group holds together, among the others
  prune_alps(tasks, s.alps, options, true, workers, group);
  gather_rows(tasks, true, group);
}

void refined_wanda(std::vector<MatrixTask>& tasks, const Statistics& s, Workers& workers,
                   const Communicator& group) {
  std::vector<at::Tensor> dense;
  for (const MatrixTask& task : tasks) dense.push_back(task.weight.clone());
  prune_wanda(tasks, s.norms, true, workers, group);
  const std::vector<uint8_t> refined = {1, 0, 1, 1};
  refine_by_dsnot(tasks, refined, dense, s.inputs, {}, workers, group);
  std::vector<SolverGram> grams;
  for (const AlpsInput& input : s.alps) grams.push_back(input.gram);
  refit(tasks, dense, grams, 5, workers, group);
  gather_rows(tasks, true, group);
}

void expect_same_bits(Method method) {
  linalg::one_library_thread();
  const Statistics s = statistics();
  Workers one(1, linalg::one_library_thread), two(2, linalg::one_library_thread);
  for (const Pattern& pattern : {Pattern{0, 0, 0.6}, Pattern{2, 4, 0.5}}) {
    auto alone = block_of_matrices(pattern), threads = block_of_matrices(pattern),
         spread = block_of_matrices(pattern), both = block_of_matrices(pattern);
    method(alone, s, one, Communicator::self());
    method(threads, s, two, Communicator::self());
    method(spread, s, one, Communicator::world(120));
    method(both, s, two, Communicator::world(120));
    for (size_t t = 0; t < alone.size(); ++t) {
      EXPECT_GT(alone[t].mask.sum().item<int64_t>(), alone[t].mask.numel() * 2 / 5);
      for (const auto* other : {&threads, &spread, &both}) {
        EXPECT_TRUE(alone[t].mask.equal((*other)[t].mask)) << alone[t].name << pattern.name();
        EXPECT_TRUE(alone[t].weight.equal((*other)[t].weight)) << alone[t].name << pattern.name();
      }
    }
  }
}

TEST(Magnitude, MaskAndWeightsAreTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  expect_same_bits(magnitude);
}

TEST(Wanda, MaskAndWeightsAreTheSameBitsOnAnyNumberOfRanksAndWorkers) { expect_same_bits(wanda); }

TEST(Sparsegpt, MaskAndWeightsAreTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  expect_same_bits(sparsegpt);
}

TEST(Wanda, TheVariantIsTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  expect_same_bits(cumulative_wanda);
}

TEST(Alps, MaskAndWeightsAreTheSameBitsOnAnyNumberOfRanksAndWorkers) { expect_same_bits(alps); }

TEST(Dsee, MasksAreTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  linalg::one_library_thread();
  Workers one(1, linalg::one_library_thread), two(2, linalg::one_library_thread);
  const Communicator world = Communicator::world(120), self = Communicator::self();
  for (const Criterion criterion :
       {Criterion::delta, Criterion::merged, Criterion::magnitude, Criterion::random}) {
    const DseeRule rule{criterion, 0.45, 3, true};
    const auto alone = pruned_model(rule, one, self);
    for (const auto& other : {pruned_model(rule, two, self), pruned_model(rule, one, world),
                              pruned_model(rule, two, world)})
      for (size_t unit = 0; unit < alone.size(); ++unit)
        for (size_t t = 0; t < alone[unit].tasks.size(); ++t) {
          const MatrixTask &expected = alone[unit].tasks[t], &found = other[unit].tasks[t];
          EXPECT_TRUE(expected.mask.equal(found.mask)) << expected.name;
          EXPECT_TRUE(expected.weight.equal(found.weight)) << expected.name;
        }
  }
}

TEST(Dsnot, MaskAndRefittedWeightsAreTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  expect_same_bits(refined_wanda);
}

}  // namespace
}  // namespace espalier::prune
