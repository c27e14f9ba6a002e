#include "pipeline/inspect/inspection.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>
#include <ranges>

#include "pipeline/errors.h"
#include "pipeline/inspect/model.h"
#include "pipeline/inspect/run.h"
#include "pipeline/io/checkpoint_layout.h"

namespace espalier::inspect {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

std::map<std::string, FileInspector>& kinds() {
  static std::map<std::string, FileInspector> all;
  return all;
}

json of_hdf5(const fs::path& file) {
  const io::Hdf5Reader reader(file);
  std::string kind;
  if (reader.has_attribute("/", "kind"))
    kind = reader.text_attribute("/", "kind");
  else if (reader.has_attribute("/", "base_checksum"))
    kind = "espalier.adapters";  // whose files have no such attribute
  if (kind.empty())
    throw UserError(fmt::format(
        "{}: does not say what it holds; it is none of espalier's files, or of an earlier version "
        "whose masks did not",
        file.string()));
  const auto found = kinds().find(kind);
  if (found == kinds().end())
    throw UserError(fmt::format("{}: its kind is '{}', none of {}", file.string(), kind,
                                fmt::join(std::views::keys(kinds()), ", ")));
  json inspection = {{"kind", kind}, {"file_bytes", fs::file_size(file)}};
  inspection.update(found->second(file));
  return inspection;
}

json of_directory(const fs::path& directory) {
  if (is_run(directory)) return describe_run(directory);
  if (is_stage(directory)) return describe_stage(directory);
  if (is_sweep(directory)) return describe_sweep(directory);
  return describe_model(directory);
}

}  // namespace

FileKind::FileKind(const std::string& kind, FileInspector inspector) {
  kinds()[kind] = std::move(inspector);
}

at::Tensor read_dataset(const io::Hdf5Reader& reader, const fs::path& file, const std::string& name,
                        at::ScalarType dtype, size_t dimensions) {
  const size_t found = reader.shape("/" + name).size();
  if (found != dimensions)
    throw UserError(
        fmt::format("{}: /{}: has {} dimensions, not {}; the file is damaged, write it again",
                    file.string(), name, found, dimensions));
  return reader.read("/" + name, dtype);
}

json inspect(const fs::path& path) {
  if (!fs::exists(path))
    throw UserError(fmt::format("{}: there is no such file or directory", path.string()));
  json inspection = {{"path", path.string()}};
  inspection.update(fs::is_directory(path)    ? of_directory(path)
                    : io::is_model_path(path) ? describe_model(path)
                                              : of_hdf5(path));
  return inspection;
}

}  // namespace espalier::inspect
