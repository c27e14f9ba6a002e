#include "stages/discover/index_sets.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/model/stored_layers.h"

namespace espalier::discover {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

fs::path state_file(const fs::path& directory, int64_t i) {
  return directory / "state" / fmt::format("set-{:06}.safetensors", i);
}

/// What is kept of one matrix: its set, and ||W||^2.
struct Result {
  IndexSet set;
  double energy = 0;
};

void write_result(const fs::path& file, const Result& result) {
  const IndexSet& set = result.set;
  io::write_safetensors(file, {{"positions", at::tensor(set.positions, at::kLong)},
                               {"facts", at::tensor({double(set.rank), set.objective,
                                                     double(set.iterations), result.energy},
                                                    at::kDouble)}});
}

Result read_result(const fs::path& file) {
  const io::SafetensorsFile stored(file);
  const at::Tensor positions = stored.view("positions").clone(),
                   facts = stored.view("facts").clone();
  const int64_t* first = positions.const_data_ptr<int64_t>();
  const double* fact = facts.const_data_ptr<double>();
  return {{{first, first + positions.numel()}, int64_t(fact[0]), fact[1], int64_t(fact[2])},
          fact[3]};
}

Result discover_one(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
                    const TargetMatrix& target, const Request& request) {
  const std::string stored = model::stored_weight_name(architecture, target.block, target.layer);
  const at::Tensor weight = model::layer_part(architecture, target.layer, checkpoint.view(stored));
  const Matrix matrix{target.name, weight.to(at::kFloat).contiguous(), request.seed};
  checkpoint.drop(stored);
  if (!at::isfinite(matrix.weight).all().item<bool>())
    throw NumericalError(
        fmt::format("{}: the weights hold NaN or Inf; look at what wrote the model", target.name));
  return {request.method.discover(matrix, request.cardinality),
          2 * squares_outside(matrix.weight, {})};
}

void write_file(const fs::path& file, const std::vector<TargetMatrix>& targets,
                const std::vector<Result>& results, const Request& request,
                const std::string& checksum) {
  io::Hdf5Writer writer(file);
  for (size_t i = 0; i < targets.size(); ++i) {
    const std::string dataset = "/" + targets[i].name;
    const IndexSet& set = results[i].set;
    writer.write(dataset, at::tensor(set.positions, at::kLong));
    writer.attribute(dataset, "method", request.method_name);
    writer.attribute(dataset, "rank", set.rank);
    writer.attribute(dataset, "objective", set.objective);
    writer.attribute(dataset, "iterations", set.iterations);
    writer.attribute(dataset, "rows", targets[i].rows);
    writer.attribute(dataset, "columns", targets[i].columns);
  }
  writer.attribute("/", "kind", std::string("espalier.index_sets"));
  writer.attribute("/", "version", int64_t{1});
  writer.attribute("/", "method", request.method_name);
  writer.attribute("/", "cardinality", request.cardinality);
  writer.attribute("/", "model_checksum", checksum);
  writer.commit();
}

json figures(const std::vector<TargetMatrix>& targets, const std::vector<Result>& results,
             const Request& request) {
  json matrices = json::array();
  for (size_t i = 0; i < targets.size(); ++i) {
    const auto& [set, energy] = results[i];
    matrices.push_back(
        {{"name", targets[i].name},
         {"rows", targets[i].rows},
         {"columns", targets[i].columns},
         {"rank", set.rank},
         {"objective", set.objective},
         {"relative_residual", energy > 0 ? std::sqrt(2 * set.objective / energy) : 0.0},
         {"iterations", set.iterations}});
  }
  return {{"method", request.method_name},
          {"cardinality", request.cardinality},
          {"matrices", std::move(matrices)}};
}

}  // namespace

json discover_index_sets(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
                         const std::vector<TargetMatrix>& targets, const Request& request,
                         const fs::path& directory, const comm::Communicator& group,
                         Workers& workers, const driver::Hooks& hooks) {
  std::vector<double> costs;
  std::vector<int64_t> done;
  for (size_t i = 0; i < targets.size(); ++i) {
    costs.push_back(request.method.predicted_cost(targets[i].rows, targets[i].columns));
    done.push_back(group.is_root() && fs::exists(state_file(directory, int64_t(i))));
  }
  driver::carry_out_units("matrices", costs, done, group, workers, hooks, [&](int64_t i) {
    write_result(state_file(directory, i),
                 discover_one(checkpoint, architecture, targets[i], request));
  });
  group.barrier();  // every result is on the disk
  const std::string checksum = driver::tensors_checksum(checkpoint, group);
  if (!group.is_root()) return {};
  std::vector<Result> results;
  for (size_t i = 0; i < targets.size(); ++i)
    results.push_back(read_result(state_file(directory, int64_t(i))));
  write_file(directory / "index_sets.h5", targets, results, request, checksum);
  return figures(targets, results, request);
}

}  // namespace espalier::discover
