#include "stages/retrain/merge.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/safetensors.h"

namespace espalier::retrain {

void write_adapters(const std::filesystem::path& file, const train::ParameterSet& parameters,
                    const std::string& method, const std::string& base_checksum) {
  io::Hdf5Writer writer(file);
  for (const train::Parameter& parameter : parameters.parameters())
    writer.write("/" + parameter.name, parameter.value.detach());
  writer.attribute("/", "method", method);
  writer.attribute("/", "base_checksum", base_checksum);
  writer.commit();
}

namespace {

/// Counts of one matrix, checked.
MergeReport compare(const Target& target, const at::Tensor& merged, bool masked) {
  if (!at::isfinite(merged).all().item<bool>())
    throw NumericalError(fmt::format(
        "{}: the merged matrix is not finite; lower retrain.learning_rate", target.name));
  MergeReport report;
  const at::Tensor was_zero = target.weight.eq(0), is_zero = merged.eq(0);
  report.nonzeros_before = target.weight.numel() - was_zero.sum().item<int64_t>();
  report.nonzeros_after = merged.numel() - is_zero.sum().item<int64_t>();
  report.filled = was_zero.logical_and(is_zero.logical_not()).sum().item<int64_t>();
  if (masked && report.filled > 0)
    throw DefectError(
        fmt::format("{}: merging filled {} zeros of the mask", target.name, report.filled));
  return report;
}

}  // namespace

MergeReport write_merged(const std::filesystem::path& directory, const io::Checkpoint& base,
                         const AdaptedModel& model, const Adapter& adapter, bool masked,
                         Workers& workers, const comm::Communicator& group) {
  std::vector<std::vector<int64_t>> targets_of;  // by block, those that have any
  const std::vector<Target>& targets = model.targets();
  for (size_t t = 0; t < targets.size(); ++t) {
    if (t == 0 || targets[t].block != targets[t - 1].block) targets_of.emplace_back();
    targets_of.back().push_back(static_cast<int64_t>(t));
  }
  const int64_t ranks = group.size(), rank = group.rank();
  const int64_t mine = (static_cast<int64_t>(targets_of.size()) - rank + ranks - 1) / ranks;
  std::vector<MergeReport> reports(workers.count());
  workers.for_each(std::max<int64_t>(mine, 0), [&](int64_t index, int worker) {
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    const std::vector<int64_t>& of_block = targets_of[rank + index * ranks];
    for (const int64_t t : of_block) {
      tensors.emplace_back(targets[t].name, adapter.merged(t).contiguous());
      const MergeReport one = compare(targets[t], tensors.back().second, masked);
      reports[worker].nonzeros_before += one.nonzeros_before;
      reports[worker].nonzeros_after += one.nonzeros_after;
      reports[worker].filled += one.filled;
    }
    const std::string name = fmt::format("block-{:05}.safetensors", targets[of_block[0]].block);
    io::write_safetensors(directory / name, tensors);
  });
  int64_t totals[3] = {0, 0, 0};
  for (const MergeReport& report : reports) {
    totals[0] += report.nonzeros_before;
    totals[1] += report.nonzeros_after;
    totals[2] += report.filled;
  }
  group.all_reduce_sum(totals);  // also: every file is written before derived.json says so
  if (group.is_root()) io::write_derived(directory, base);
  group.barrier();
  return {totals[0], totals[1], totals[2]};
}

}  // namespace espalier::retrain
