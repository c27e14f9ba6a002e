#pragma once
/// Which tensors of a safetensors file are packed (packed_tensor.h). The header's __metadata__ says
/// it under "espalier.packed", a JSON object as text:
///   {"NAME": {"packing": "bitmask", "shape": [576, 1536]},
///    "NAME": {"packing": "2:4", "axis": 1, "shape": [576, 1536]}, ...}
/// NAME's dtype is that of NAME.values.

#include <map>
#include <string>

#include "pipeline/io/packed_tensor.h"

namespace espalier::io {

inline constexpr const char* kPackedKey = "espalier.packed";

/// The text that says it.
std::string packed_metadata(const std::map<std::string, Packing>& packed);

/// The packed tensors of a file, by name. What it says is hostile: throws UserError naming file,
/// tensor and numbers unless the parts are there with the dtypes and sizes that shape and packing
/// ask for. Reads no data: unpack() checks bits and indices.
std::map<std::string, Packing> packed_tensors(const SafetensorsFile& file);

}  // namespace espalier::io
