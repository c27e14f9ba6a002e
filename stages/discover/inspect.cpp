/// index_sets.h5 for `espalier inspect`.

#include <ATen/ATen.h>

#include "pipeline/inspect/inspection.h"
#include "pipeline/io/hdf5.h"

namespace espalier::discover {
namespace {

using json = nlohmann::ordered_json;

json describe(const std::filesystem::path& file) {
  const io::Hdf5Reader reader(file);
  json matrices = json::array();
  for (const std::string& name : reader.children()) {
    json row = {{"name", name}};
    for (const char* key : {"rows", "columns", "rank", "iterations"})
      row[key] = reader.integer_attribute("/" + name, key);
    row["objective"] = reader.number_attribute("/" + name, "objective");
    row["positions"] = inspect::read_dataset(reader, file, name, at::kLong, 1).numel();
    matrices.push_back(std::move(row));
  }
  return {{"method", reader.text_attribute("/", "method")},
          {"cardinality", reader.integer_attribute("/", "cardinality")},
          {"model_checksum", reader.text_attribute("/", "model_checksum")},
          {"matrices", std::move(matrices)}};
}

const inspect::FileKind registration{"espalier.index_sets", describe};

}  // namespace
}  // namespace espalier::discover
