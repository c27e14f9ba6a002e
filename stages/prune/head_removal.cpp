#include "stages/prune/head_removal.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string_view>

#include "pipeline/driver/spread.h"
#include "pipeline/driver/stage_hooks.h"
#include "pipeline/driver/units.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/json.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/model/head_slice.h"
#include "pipeline/train/adapters_h5.h"
#include "stages/prune/criterion.h"

namespace espalier::prune {
namespace {

namespace fs = std::filesystem;
using model::Architecture;
using model::Linear;
using nlohmann::json;

fs::path state_file(const driver::StageContext& context, int64_t block) {
  return context.state_directory() / fmt::format("heads-{:05}.json", block);
}
fs::path block_file(const driver::StageContext& context, int64_t block) {
  return context.directory / "model" / fmt::format("block-{:05}.safetensors", block);
}

/// `places` among the block's heads leave it.
std::vector<int64_t> left_over(const std::vector<int64_t>& heads,
                               const std::vector<int64_t>& places) {
  std::vector<int64_t> kept;
  for (size_t place = 0; place < heads.size(); ++place)
    if (!std::binary_search(places.begin(), places.end(), static_cast<int64_t>(place)))
      kept.push_back(heads[place]);
  return kept;
}

void remove_of_block(const driver::StageContext& context, const PruningMethod& method,
                     const io::Checkpoint& checkpoint, const Architecture& a, int64_t block,
                     int64_t count) {
  c10::InferenceMode guard;
  const std::vector<int64_t> heads = a.heads_of(block).query;
  const std::vector<double> scores = method.head_scores({checkpoint, a, block, context.run.seed});
  const std::vector<int64_t> gone = lowest(scores, count), kept = left_over(heads, gone);
  Architecture smaller = a;
  smaller.kept_heads.resize(a.blocks);
  smaller.kept_heads[block] = kept;
  io::write_safetensors(block_file(context, block),
                        model::with_heads(checkpoint, a, smaller, block));
  json removed = json::array();
  for (const int64_t place : gone) removed.push_back(heads[place]);
  const json decided = {{"kept", kept}, {"removed", removed}, {"scores", scores}};
  io::write_file(state_file(context, block), decided.dump());  // last: its presence says "done"
}

/// The adapter whose terms stand beside the model, where there is one. Throws UserError where what
/// it is made of cannot follow the heads.
std::optional<train::AdaptersFile> adapter_beside(const io::Checkpoint& checkpoint) {
  const fs::path file = train::adapters_beside(checkpoint);
  if (file.empty()) return std::nullopt;
  train::AdaptersFile adapter = train::read_adapters_h5(file);
  const std::vector<std::string> able = {"lora", "dsee", "lora_xs"};
  if (std::find(able.begin(), able.end(), adapter.identity.method) == able.end())
    throw UserError(fmt::format(
        "prune.pattern: heads, but {} stands beside the matrices ({}), and an adapter without the "
        "heads' rows is no {} any more; {} can lose them, and so can a model into which the "
        "adapter was merged (retrain.merge: dense)",
        adapter.identity.method, file.string(), adapter.identity.method, fmt::join(able, ", ")));
  return adapter;
}

/// The layer's slices by the names of their weights.
std::map<std::string, model::HeadSlice> all_slices(const Architecture& a,
                                                   const Architecture& smaller) {
  std::map<std::string, model::HeadSlice> slices;
  for (int64_t block = 0; block < a.blocks; ++block)
    for (const Linear& linear : a.linears)
      slices[a.weight_name(block, linear)] = model::head_slice(
          a, a.in_block(block, linear), a.heads_of(block), smaller.heads_of(block));
  return slices;
}

/// Of a parameter or frozen tensor "MATRIX/part" the matrix and the part.
std::pair<std::string, std::string> parts_of(std::string_view path) {
  path.remove_prefix(path.starts_with(train::kFrozenGroup) ? train::kFrozenGroup.size() : 1);
  const size_t slash = path.rfind('/');
  if (slash == std::string_view::npos) return {"", std::string(path)};
  return {std::string(path.substr(0, slash)), std::string(path.substr(slash + 1))};
}

/// Without what left: rows of B and of lora_xs' `up`, columns of A and of its `down`, entries of S
/// (stages/retrain/lora.cpp, dsee.cpp, lora_xs.cpp).
train::AdaptersFile sliced_adapter(const train::AdaptersFile& adapter,
                                   const std::map<std::string, model::HeadSlice>& slices) {
  std::map<std::string, at::Tensor> positions;  // by matrix
  for (const auto& [path, value] : adapter.tensors)
    if (const auto [matrix, part] = parts_of(path); part == "positions") positions[matrix] = value;
  train::AdaptersFile sliced{adapter.identity, {}};
  for (const auto& [path, value] : adapter.tensors) {
    const auto [matrix, part] = parts_of(path);
    const auto slice = slices.find(matrix);
    at::Tensor left = value;
    if (slice != slices.end() && slice->second.touches()) {
      if (part == "A" || part == "down") left = take_columns(slice->second, value);
      if (part == "B" || part == "up") left = take_rows(slice->second, value);
      if (part == "positions") left = model::take_positions(slice->second, value).second;
      if (part == "S")
        left =
            value.index_select(0, model::take_positions(slice->second, positions.at(matrix)).first);
    }
    sliced.tensors.emplace_back(path, left);
  }
  return sliced;
}

json read_state(const fs::path& file) { return io::parse_json(io::read_file(file), file.string()); }

}  // namespace

void require_heads(const Architecture& architecture, int64_t count) {
  for (int64_t block = 0; block < architecture.blocks; ++block) {
    const int64_t there = architecture.heads_of(block).queries();
    if (count >= there)
      throw UserError(
          fmt::format("prune.heads: {} heads would go from block {}, which has {}; at least one "
                      "must stay",
                      count, block, there));
  }
}

json remove_heads(driver::StageContext& context, const PruningMethod& method,
                  const io::Checkpoint& checkpoint, const Architecture& architecture,
                  int64_t count) {
  const driver::RunContext& run = context.run;
  require_heads(architecture, count);
  const std::optional<train::AdaptersFile> adapter = adapter_beside(checkpoint);
  std::vector<int64_t> done;
  for (int64_t block = 0; block < architecture.blocks; ++block)
    done.push_back(run.group.is_root() && fs::exists(state_file(context, block)) &&
                   fs::exists(block_file(context, block)));
  driver::carry_out_units("blocks", std::vector<double>(architecture.blocks, 1), done, run.group,
                          *run.workers, driver::hooks_of(context), [&](int64_t block) {
                            remove_of_block(context, method, checkpoint, architecture, block,
                                            count);
                          });
  run.group.barrier();  // every block is on the disk
  Architecture smaller = architecture;
  json blocks = json::array();
  const fs::path directory = context.directory / "model";
  if (run.group.is_root()) {
    smaller.kept_heads.clear();
    for (int64_t block = 0; block < architecture.blocks; ++block) {
      blocks.push_back(read_state(state_file(context, block)));
      smaller.kept_heads.push_back(blocks.back().at("kept"));
    }
    model::write_kept_heads(directory, smaller.kept_heads);
  }
  driver::write_derived(directory, checkpoint, run.group);
  std::string base;
  if (adapter)
    base = driver::tensors_checksum(
        train::without_terms(io::Checkpoint::open(directory), train::matrices_of(*adapter)),
        run.group);
  if (!run.group.is_root()) return {};
  if (adapter) {
    train::AdaptersFile sliced = sliced_adapter(*adapter, all_slices(architecture, smaller));
    sliced.identity.base_checksum = base;
    train::write_adapters_h5(context.directory / "adapters.h5", sliced);
  }
  return {{"heads", count}, {"blocks", blocks}};
}

}  // namespace espalier::prune
