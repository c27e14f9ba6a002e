/// DSEE (arXiv 2111.00160): dW = alpha/r (B A + P_Omega(S)), A ~ N(0, 0.02^2), B = 0 and S = 0 at
/// the start, Omega a fixed set of positions in each matrix. alpha/r stands before both terms, as
/// in the authors' program. On a pruned model the paper keeps dW beside W * M (merge: beside).

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <set>

#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/random.h"
#include "stages/retrain/added.h"
#include "stages/retrain/start_values.h"

namespace espalier::retrain {

namespace {

constexpr double kStartDeviation = 0.02;  // of A

struct DseeOptions {
  int64_t rank = 16, cardinality = 16;
  double alpha = 32;
  AddedOptions added;
  enum class Positions { none, random, discovered } positions = Positions::discovered;
  std::string index_sets;  ///< a file that was named; empty: what discover left
  bool sparse() const { return positions != Positions::none; }
};

class DseeMatrix : public AddedMatrix {
 public:
  DseeMatrix(Target target, const DseeOptions& options, const at::Tensor& index_set)
      : AddedMatrix(std::move(target), options.added, index_set), rank_(options.rank) {}

  std::vector<train::Parameter> initial(uint64_t seed) const override {
    const std::string& name = target().name;
    std::vector<train::Parameter> parameters = {
        {name + "/A", normal_start(seed, "dsee.A", name, {rank_, columns()}, kStartDeviation), 1.0},
        {name + "/B", at::zeros({rows(), rank_}, at::kFloat), 1.0}};
    if (positions().defined())
      parameters.push_back({name + "/S", at::zeros({positions().numel()}, at::kFloat), 1.0});
    return parameters;
  }
  NamedTensors frozen() const override {
    if (!positions().defined()) return {};
    return {{target().name + "/positions", positions()}};
  }

 protected:
  Terms terms() const override {
    return {values()[0], values()[1], positions().defined() ? values()[2] : at::Tensor()};
  }
  std::vector<at::Tensor> pull_back(const Terms& gradient) const override {
    std::vector<at::Tensor> all = {gradient.down, gradient.up};
    if (positions().defined()) all.push_back(gradient.values);
    return all;
  }

 private:
  int64_t rank_;
};

/// `count` different positions of the matrix, ascending.
at::Tensor random_positions(const std::string& name, int64_t numel, int64_t count, uint64_t seed) {
  const CounterRandom random(seed, "dsee.positions", stream_of(name));
  std::set<int64_t> chosen;
  for (uint64_t draw = 0; static_cast<int64_t>(chosen.size()) < count; ++draw)
    chosen.insert(static_cast<int64_t>(random.below(draw, static_cast<uint64_t>(numel))));
  return at::tensor(std::vector<int64_t>(chosen.begin(), chosen.end()), at::kLong);
}

/// Throws UserError when they are not ascending positions of a matrix of `numel`.
void check_ascending(const at::Tensor& positions, const std::string& where, int64_t numel) {
  const int64_t* values = positions.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < positions.numel(); ++i)
    if (values[i] < 0 || values[i] >= numel || (i > 0 && values[i] <= values[i - 1]))
      throw UserError(
          fmt::format("{}: position {} is {}, but ascending positions inside [0, {}) are expected",
                      where, i, values[i], numel));
}

/// The same, and that there are `count` of them.
void check_positions(const at::Tensor& positions, const std::string& where, int64_t numel,
                     int64_t count) {
  if (positions.dim() != 1 || positions.numel() != count)
    throw UserError(fmt::format(
        "{} has {} positions, but retrain.cardinality is {}; set it to what discover was given",
        where, positions.numel(), count));
  check_ascending(positions, where, numel);
}

/// What an adapter left: at most `count`, as some may have gone with removed heads.
at::Tensor adapter_positions(const at::Tensor& positions, const Target& target, int64_t count) {
  const std::string where = target.name + "/positions of the adapter";
  if (positions.dim() != 1 || positions.numel() > count)
    throw UserError(
        fmt::format("{} is no list of at most retrain.cardinality = {} positions", where, count));
  check_ascending(positions, where, target.weight.numel());
  return positions.contiguous();
}

at::Tensor stored_positions(const std::filesystem::path& file, const std::string& matrix,
                            int64_t rows, int64_t columns, int64_t count) {
  if (!std::filesystem::is_regular_file(file))
    throw UserError(fmt::format(
        "retrain.index_sets: {} is no file; discover leaves one, index_sets.h5", file.string()));
  const io::Hdf5Reader reader(file);
  const std::string dataset = "/" + matrix;
  if (!reader.has(dataset))
    throw UserError(fmt::format(
        "{} has no index set of {}; give discover.targets and retrain.targets the same matrices",
        file.string(), matrix));
  const std::string where = fmt::format("{}: {}", file.string(), matrix);
  if (reader.integer_attribute(dataset, "rows") != rows ||
      reader.integer_attribute(dataset, "columns") != columns)
    throw UserError(
        fmt::format("{} is of another shape than the model's [{}, {}]", where, rows, columns));
  const at::Tensor positions = reader.read(dataset, at::kLong);
  check_positions(positions, where, rows * columns, count);
  return positions;
}

class DseeMethod : public MatrixMethod {
 public:
  explicit DseeMethod(const DseeOptions& options) : options_(options) {}

  void check(const std::string& matrix, int64_t rows, int64_t columns) const override {
    check_rank(matrix, rows, columns, options_.rank);
    if (options_.sparse() && options_.cardinality > rows * columns)
      throw UserError(fmt::format("{} [{}, {}] has fewer than retrain.cardinality = {} values",
                                  matrix, rows, columns, options_.cardinality));
    if (!options_.index_sets.empty())
      stored_positions(options_.index_sets, matrix, rows, columns, options_.cardinality);
  }
  nlohmann::json settings() const override {
    return {{"adapter_rank", options_.rank},
            {"alpha", options_.alpha},
            {"cardinality", options_.cardinality}};
  }
  bool needs_index_sets() const override {
    return options_.positions == DseeOptions::Positions::discovered;
  }
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override {
    return options_.rank * (rows + columns) + (options_.sparse() ? options_.cardinality : 0);
  }
  bool additive() const override { return true; }

 protected:
  std::unique_ptr<AdaptedMatrix> make(Target target, const AttachOptions& options) const override {
    const at::Tensor positions = index_set(target, options);
    return std::make_unique<DseeMatrix>(std::move(target), options_, positions);
  }

 private:
  at::Tensor index_set(const Target& target, const AttachOptions& options) const {
    if (!options_.sparse()) return {};
    const int64_t count = options_.cardinality;
    const at::Tensor* stored = frozen_tensor(options, target.name + "/positions", at::kLong);
    if (stored) return adapter_positions(*stored, target, count);
    if (options_.positions == DseeOptions::Positions::random)
      return random_positions(target.name, target.weight.numel(), count, options.seed);
    if (options.index_sets.empty())
      throw UserError(
          "retrain.index_sets: no discover stage before this one left index sets; put discover "
          "into "
          "pipeline, name a file index_sets.h5, or choose random or none");
    return stored_positions(options.index_sets, target.name, target.weight.size(0),
                            target.weight.size(1), count);
  }

  DseeOptions options_;
};

std::unique_ptr<AdapterMethod> read_dsee(const config::Section& section) {
  DseeOptions options;
  options.rank = section.integer_or("adapter_rank", options.rank, {.low = 1});
  options.alpha = section.number_or("alpha", options.alpha, {.low = 0, .low_open = true});
  options.added.scale = options.alpha / static_cast<double>(options.rank);
  options.added.dropout = section.number_or("dropout", 0, {.low = 0, .high = 1, .high_open = true});
  const std::string positions = section.text_or("index_sets", "");
  if (positions == "none") options.positions = DseeOptions::Positions::none;
  if (positions == "random") options.positions = DseeOptions::Positions::random;
  if (options.positions == DseeOptions::Positions::discovered) options.index_sets = positions;
  options.cardinality = section.integer_or("cardinality", options.cardinality, {.low = 1});
  return std::make_unique<DseeMethod>(options);
}

const AdapterRegistration registration{
    "dsee", read_dsee, {"adapter_rank", "alpha", "dropout", "index_sets", "cardinality"}};

}  // namespace

}  // namespace espalier::retrain
