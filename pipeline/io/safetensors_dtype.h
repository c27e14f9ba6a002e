#pragma once
/// The dtypes of safetensors that espalier reads and writes.

#include <c10/core/ScalarType.h>

#include <array>
#include <string_view>

namespace espalier::io {

struct DtypeName {
  std::string_view name;
  at::ScalarType dtype;
};

inline constexpr std::array<DtypeName, 10> kDtypeNames = {{{"F64", at::kDouble},
                                                           {"F32", at::kFloat},
                                                           {"F16", at::kHalf},
                                                           {"BF16", at::kBFloat16},
                                                           {"I64", at::kLong},
                                                           {"I32", at::kInt},
                                                           {"I16", at::kShort},
                                                           {"I8", at::kChar},
                                                           {"U8", at::kByte},
                                                           {"BOOL", at::kBool}}};

/// "F32"; empty for a type that safetensors does not have.
constexpr std::string_view name_of(at::ScalarType dtype) {
  for (const DtypeName& known : kDtypeNames)
    if (known.dtype == dtype) return known.name;
  return {};
}

}  // namespace espalier::io
