#include "pipeline/driver/spread.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/checksum.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;

/// Rank 0's outputs, on every rank.
std::vector<io::Output> of_root(const std::vector<io::Output>& outputs,
                                const comm::Communicator& group) {
  if (group.size() == 1) return outputs;
  const std::string text = group.broadcast(group.is_root() ? io::json_of(outputs).dump() : "");
  return io::outputs_of(nlohmann::json::parse(text), "rank 0's list of outputs");
}

std::vector<int64_t> bytes_of(const std::vector<io::Output>& outputs) {
  std::vector<int64_t> bytes;
  for (const auto& output : outputs) bytes.push_back(output.bytes);
  return bytes;
}

}  // namespace

std::vector<std::string> spread(const std::vector<int64_t>& bytes, const comm::Communicator& group,
                                const std::function<std::string(int64_t item)>& compute) {
  std::vector<int64_t> order(bytes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return bytes[a] > bytes[b]; });
  std::vector<std::string> texts(bytes.size());
  const auto ranks = static_cast<size_t>(group.size()), rank = static_cast<size_t>(group.rank());
  for (size_t first = 0; first < order.size(); first += ranks) {
    std::string mine;
    if (first + rank < order.size()) mine = compute(order[first + rank]);
    const auto round = group.all_gather(comm::bytes_of(std::span(mine)));
    for (size_t i = 0; i < ranks && first + i < order.size(); ++i)
      texts[order[first + i]].assign(reinterpret_cast<const char*>(round[i].data()),
                                     round[i].size());
  }
  return texts;
}

std::vector<io::Output> with_checksums(const std::filesystem::path& directory,
                                       const std::vector<io::Output>& outputs,
                                       const comm::Communicator& group) {
  std::vector<io::Output> all = of_root(outputs, group);
  const auto checksums = spread(
      bytes_of(all), group, [&](int64_t i) { return io::file_checksum(directory / all[i].path); });
  for (size_t i = 0; i < all.size(); ++i) all[i].checksum = checksums[i];
  return all;
}

std::vector<io::Output> list_outputs(const std::filesystem::path& directory,
                                     const comm::Communicator& group) {
  return with_checksums(
      directory, group.is_root() ? io::find_outputs(directory) : std::vector<io::Output>(), group);
}

std::string damaged_output(const std::filesystem::path& directory,
                           const std::vector<io::Output>& outputs,
                           const comm::Communicator& group) {
  const std::vector<io::Output> all = of_root(outputs, group);
  for (const std::string& damage :
       spread(bytes_of(all), group, [&](int64_t i) { return io::damage_of(directory, all[i]); }))
    if (!damage.empty()) return damage;
  return "";
}

std::string tensors_checksum(const io::Checkpoint& model, const comm::Communicator& group) {
  const std::vector<std::string> names = model.names();
  std::vector<int64_t> bytes;
  for (const auto& name : names) bytes.push_back(model.info(name).bytes());
  const auto checksums =
      spread(bytes, group, [&](int64_t i) { return model.tensor_checksum(names[i]); });
  for (size_t i = 0; i < names.size(); ++i) model.learn_tensor_checksum(names[i], checksums[i]);
  return model.tensors_checksum();
}

void write_derived(const std::filesystem::path& directory, const io::Checkpoint& base,
                   const comm::Communicator& group) {
  tensors_checksum(base, group);  // from now on rank 0 knows it
  if (group.is_root()) io::write_derived(directory, base);
  group.barrier();
}

std::vector<std::string> write_export(const io::ModelExport& model, const comm::Communicator& group,
                                      const std::function<void(int64_t done)>& advance) {
  if (group.is_root()) model.begin();
  group.barrier();
  const fs::path& directory = model.directory();
  const fs::path config = directory / io::kConfigFile;
  group.require_same(directory.string() + " (it must lie on a file system that all ranks share)",
                     fs::exists(config) ? io::file_checksum(config) : "absent");
  for (int64_t first = 0; first < model.shards(); first += group.size()) {
    if (first + group.rank() < model.shards()) model.write_shard(first + group.rank());
    group.barrier();
    if (advance) advance(std::min(first + group.size(), model.shards()));
  }
  if (group.is_root()) model.finish();
  group.barrier();
  return model.files();
}

}  // namespace espalier::driver
