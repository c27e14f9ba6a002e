// ERE (arXiv 2305.18425): quantized singular vectors, decoded to the nearest orthonormal ones.
#include "stages/compress/method.h"

namespace espalier::compress {
namespace {

class Ere : public Method {
 public:
  void read(const config::Section& section, Settings& settings) const override {
    read_truncation(section, settings);
    settings.bits = section.integer_or("bits", settings.bits, {1, 8});
    settings.polar = section.flag_or("polar", settings.polar);
  }
  bool truncates() const override { return true; }
  EncodedMatrix encode(const Difference& difference, const Settings& settings,
                       EncodingErrors* errors) const override {
    return encode_matrix(difference, settings.bits, settings.polar, errors);
  }
};

const MethodRegistration registration{"ere", std::make_unique<Ere>()};

}  // namespace
}  // namespace espalier::compress
