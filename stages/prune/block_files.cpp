#include "stages/prune/block_files.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <map>
#include <string>

#include "pipeline/io/hdf5.h"
#include "pipeline/io/json.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/model/stored_layers.h"

namespace espalier::prune {
namespace {

constexpr const char* kReport = "report";  // in the journal, beside the columns of each matrix

at::Tensor pack_bits(const at::Tensor& mask) {
  const int64_t rows = mask.size(0), columns = mask.size(1), width = (columns + 7) / 8;
  at::Tensor packed = at::zeros({rows, width}, at::kByte);
  const uint8_t* from = mask.const_data_ptr<uint8_t>();
  uint8_t* to = packed.data_ptr<uint8_t>();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      to[row * width + column / 8] |=
          static_cast<uint8_t>((from[row * columns + column] & 1) << (7 - column % 8));
  return packed;
}

}  // namespace

int64_t count_bits(const at::Tensor& packed) {
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>();
  int64_t bits = 0;
  for (int64_t i = 0; i < packed.numel(); ++i) bits += __builtin_popcount(bytes[i]);
  return bits;
}

BlockFiles::BlockFiles(const driver::StageContext& context, const model::Architecture& architecture,
                       const io::Checkpoint& base)
    : directory_(context.directory),
      state_(context.state_directory()),
      architecture_(architecture),
      base_(base) {}

std::filesystem::path BlockFiles::weights_file(int64_t block) const {
  if (block == architecture_.blocks) return model_directory() / "ends.safetensors";
  return model_directory() / fmt::format("block-{:05}.safetensors", block);
}
std::filesystem::path BlockFiles::mask_file(int64_t block) const {
  return state_ / fmt::format("mask-{:05}.safetensors", block);
}

int64_t BlockFiles::finished_blocks(const comm::Communicator& group, int64_t blocks) const {
  int64_t done = 0;
  if (group.is_root())
    while (done < blocks && exists(mask_file(done)) && exists(weights_file(done))) ++done;
  group.broadcast(comm::bytes_of(std::span(&done, 1)), 0);
  return done;
}

void BlockFiles::write(int64_t block, std::span<const MatrixTask> tasks, at::ScalarType dtype,
                       const nlohmann::json& report) const {
  std::vector<std::pair<std::string, at::Tensor>> weights, masks;
  std::map<std::string, std::string> columns = {{kReport, report.dump()}};
  for (const auto& task : tasks) {
    weights.emplace_back(task.name, task.weight.to(dtype).contiguous());
    masks.emplace_back(task.name, pack_bits(task.mask));
    columns[task.name] = std::to_string(task.mask.size(1));
  }
  io::write_safetensors(weights_file(block), model::stored_tensors(architecture_, base_, weights));
  io::write_safetensors(mask_file(block), masks, columns);  // last: its presence says "done"
}

std::vector<nlohmann::json> BlockFiles::reports(int64_t blocks) const {
  std::vector<nlohmann::json> all;
  for (int64_t block = 0; block < blocks; ++block) {
    const io::SafetensorsFile masks(mask_file(block));
    all.push_back(io::parse_json(masks.metadata().at(kReport), mask_file(block).string()));
  }
  return all;
}

nlohmann::json BlockFiles::assemble_masks(int64_t blocks) const {
  nlohmann::json matrices = nlohmann::json::array();
  io::Hdf5Writer out(directory_ / "masks.h5");
  for (int64_t block = 0; block < blocks; ++block) {
    const io::SafetensorsFile masks(mask_file(block));
    for (const auto& [name, info] : masks.tensors()) {
      const at::Tensor packed = masks.view(name);
      const int64_t rows = packed.size(0), columns = std::stoll(masks.metadata().at(name));
      const std::string dataset = "/" + name;
      out.write(dataset, packed);
      out.attribute(dataset, "columns", columns);
      const int64_t zeros = count_bits(packed);
      matrices.push_back(
          {{"name", name},
           {"rows", rows},
           {"columns", columns},
           {"zeros", zeros},
           {"sparsity", static_cast<double>(zeros) / static_cast<double>(rows * columns)}});
    }
  }
  out.attribute("/", "kind", std::string("espalier.masks"));
  out.commit();
  return matrices;
}

}  // namespace espalier::prune
