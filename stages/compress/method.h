#pragma once
/// What every compression method is: how the difference of one matrix becomes codes.
///
/// A method is one file: it reads its own keys, says whether its matrices are truncated, encodes
/// one, and registers itself under the name that `compress.method` uses. What it leaves is decoded
/// by decode_matrix (ere.h), which needs to know nothing of it.

#include <memory>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "stages/compress/ere.h"
#include "stages/compress/settings.h"

namespace espalier::compress {

class Method {
 public:
  virtual ~Method() = default;
  /// Reads its keys; refuses those it has no use for when they are set.
  virtual void read(const config::Section& section, Settings& settings) const = 0;
  /// True: matrices are decomposed and share truncation ranks. False: each is encoded as it is,
  /// without singular vectors.
  virtual bool truncates() const = 0;
  virtual EncodedMatrix encode(const Difference& difference, const Settings& settings,
                               EncodingErrors* errors) const = 0;
};

/// const MethodRegistration registration{"ere", std::make_unique<Ere>()};
struct MethodRegistration {
  MethodRegistration(const std::string& name, std::unique_ptr<Method> method);
};
/// The registered names, sorted.
std::vector<std::string> method_names();
/// Throws DefectError when there is none of `name`.
const Method& method_of(const std::string& name);

/// Throws UserError at the first of `keys` that is set: "METHOD has no ...".
void refuse_keys(const config::Section& section, const std::vector<std::string>& keys,
                 const std::string& why);
/// rank or budget (exactly one of them), allocation and prior.
void read_truncation(const config::Section& section, Settings& settings);

}  // namespace espalier::compress
