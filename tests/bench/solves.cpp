/// Seconds of the SparseGPT solves of one block, the factors of its distinct inputs included. The
/// other side of `plain.py solves`.
///
///   bench PATTERN THREADS REPETITIONS NAME:ROWSxINPUTS:STATISTIC...
///   bench 2:4 2 3 q_proj:576x576:0 k_proj:192x576:0 down_proj:576x1536:1
///
/// Matrices of one STATISTIC (0, 1, ...) read the same input, so that they share a Gram and a
/// factor. One repetition more than asked warms up. Prints one line of JSON.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/linalg/factor.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"
#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {
namespace {

at::Tensor normals(const std::string& purpose, int64_t rows, int64_t columns) {
  const CounterRandom random(17, purpose);
  at::Tensor t = at::empty({rows, columns}, at::kFloat);
  float* values = t.data_ptr<float>();
  for (int64_t i = 0; i < rows * columns; ++i) values[i] = static_cast<float>(random.normal(i));
  return t;
}

/// The matrices of one block, and the Gram (float64) of every distinct input.
struct Problem {
  std::vector<MatrixTask> tasks;
  std::vector<at::Tensor> grams;
};

// Correlated inputs, twice as many tokens as inputs.
at::Tensor gram_of(int64_t statistic, int64_t inputs) {
  at::Tensor tokens = normals(fmt::format("tokens {}", statistic), 2 * inputs, inputs);
  tokens = (tokens + 0.5 * tokens.roll(1, 1)).to(at::kDouble);
  return at::mm(tokens.t(), tokens);
}

void add_matrix(Problem& problem, const std::string& shape) {
  char name[64] = {};
  long rows = 0, inputs = 0, statistic = 0;
  if (std::sscanf(shape.c_str(), "%63[^:]:%ldx%ld:%ld", name, &rows, &inputs, &statistic) != 4 ||
      rows < 1 || inputs < 1 || statistic < 0 || statistic > 63)
    throw UserError(shape + " is not NAME:ROWSxINPUTS:STATISTIC (STATISTIC counts from 0)");
  if (static_cast<size_t>(statistic) >= problem.grams.size()) problem.grams.resize(statistic + 1);
  at::Tensor& gram = problem.grams[statistic];
  if (!gram.defined()) gram = gram_of(statistic, inputs);
  if (gram.size(0) != inputs)
    throw UserError(fmt::format("{}: statistic {} has {} inputs elsewhere; give it another number",
                                shape, statistic, gram.size(0)));
  problem.tasks.push_back(
      {name, normals(name, rows, inputs), statistic, at::zeros({rows, inputs}, at::kByte)});
}

Problem copy_of(const Problem& problem) {
  Problem copy = problem;
  for (MatrixTask& task : copy.tasks) {
    task.weight = task.weight.clone();
    task.mask = task.mask.clone();
  }
  for (at::Tensor& gram : copy.grams)
    if (gram.defined()) gram = gram.clone();
  return copy;
}

// Factors are whole on one worker each, as in the prune stage; then the tiles of all matrices.
double solve_seconds(Problem problem, const Pattern& pattern, Workers& workers) {
  using Clock = std::chrono::steady_clock;
  for (MatrixTask& task : problem.tasks) task.pattern = pattern;
  const Clock::time_point begin = Clock::now();
  const auto count = static_cast<int64_t>(problem.grams.size());
  std::vector<at::Tensor> factors(count);
  std::vector<std::vector<int64_t>> dead_inputs(count);
  workers.for_each(count, [&](int64_t i, int) {
    const int64_t largest_first = count - 1 - i;
    at::Tensor& gram = problem.grams[largest_first];
    if (!gram.defined()) return;
    linalg::FactorReport report;
    factors[largest_first] =
        linalg::inverse_factor(gram, 0.01, fmt::format("input {}", largest_first), report);
    dead_inputs[largest_first] = report.dead_inputs;
  });
  prune_sparsegpt(problem.tasks, factors, dead_inputs, 128, true, workers,
                  comm::Communicator::self());
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void run(int count, char** arguments) {
  if (count < 5)
    throw UserError("bench takes PATTERN THREADS REPETITIONS NAME:ROWSxINPUTS:STATISTIC...");
  const Pattern pattern = parse_pattern(arguments[1], 0.5);
  const int threads = std::atoi(arguments[2]), repetitions = std::atoi(arguments[3]);
  if (threads < 1 || repetitions < 1)
    throw UserError("bench: THREADS and REPETITIONS are whole numbers from 1 on");
  Problem problem;
  for (int i = 4; i < count; ++i) add_matrix(problem, arguments[i]);
  Workers workers(threads, linalg::one_library_thread);
  solve_seconds(copy_of(problem), pattern, workers);
  std::string seconds;
  for (int i = 0; i < repetitions; ++i)
    seconds += fmt::format("{}{:.6f}", i == 0 ? "" : ", ",
                           solve_seconds(copy_of(problem), pattern, workers));
  std::printf("{\"pattern\": \"%s\", \"threads\": %d, \"products\": \"%s\", \"seconds\": [%s]}\n",
              pattern.name().c_str(), threads, linalg::product_description().c_str(),
              seconds.c_str());
}

}  // namespace
}  // namespace espalier::prune

int main(int count, char** arguments) try {
  espalier::prune::run(count, arguments);
  return 0;
} catch (const espalier::Error& error) {
  std::fprintf(stderr, "espalier: %s\n", error.what());
  return error.exit_code();
}
