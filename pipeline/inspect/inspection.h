#pragma once
/// `espalier inspect PATH`: what a model, an artifact or a run holds, as JSON and as text.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "pipeline/io/hdf5.h"

namespace espalier::inspect {

using Facts = nlohmann::ordered_json;  ///< in the order in which a person reads them

/// Describes a file of one kind: scalars, and lists of rows ("tensors": [{"name", ...}, ...]).
using FileInspector = std::function<Facts(const std::filesystem::path&)>;

/// const FileKind registration{"espalier.residual", describe}; the kind is what the HDF5 file's
/// attribute of that name says.
struct FileKind {
  FileKind(const std::string& kind, FileInspector inspector);
};

/// A data set of `file`, whole. Throws UserError unless it has so many dimensions.
at::Tensor read_dataset(const io::Hdf5Reader& reader, const std::filesystem::path& file,
                        const std::string& name, at::ScalarType dtype, size_t dimensions);

/// {"kind", "path", ...} of a checkpoint (directory or .safetensors file), a run's or a stage's
/// directory, or an HDF5 file of espalier's. Reads all tensors of a model to count zeros. Throws
/// UserError naming the path when it is none of these, or damaged.
Facts inspect(const std::filesystem::path& path);

/// For a person: shares in percent; tensors and files whose names differ in numbers alone are one
/// line, with how many they are and the ranges of what differs.
std::string text_of(const Facts& inspection);

}  // namespace espalier::inspect
