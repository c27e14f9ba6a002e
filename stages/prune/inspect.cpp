/// masks.h5 for `espalier inspect`.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/inspect/inspection.h"
#include "pipeline/io/hdf5.h"
#include "stages/prune/block_files.h"

namespace espalier::prune {
namespace {

using json = nlohmann::ordered_json;

double share(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

json describe(const std::filesystem::path& file) {
  const io::Hdf5Reader reader(file);
  json matrices = json::array();
  int64_t all_zeros = 0, all = 0;
  for (const std::string& name : reader.children()) {
    const at::Tensor packed = inspect::read_dataset(reader, file, name, at::kByte, 2);
    const int64_t rows = packed.size(0), columns = reader.integer_attribute("/" + name, "columns");
    if (columns < 1 || packed.size(1) != (columns + 7) / 8)
      throw UserError(
          fmt::format("{}: /{}: {} bytes a row are no mask of {} columns; the file is "
                      "damaged, prune again",
                      file.string(), name, packed.size(1), columns));
    const int64_t zeros = count_bits(packed), elements = rows * columns;
    all_zeros += zeros, all += elements;
    matrices.push_back({{"name", name},
                        {"rows", rows},
                        {"columns", columns},
                        {"zeros", zeros},
                        {"sparsity", share(zeros, elements)}});
  }
  return {{"zeros", all_zeros}, {"sparsity", share(all_zeros, all)}, {"matrices", matrices}};
}

const inspect::FileKind registration{"espalier.masks", describe};

}  // namespace
}  // namespace espalier::prune
