// A baseline of ERE: the truncated singular value decomposition alone, its vectors in float16.
#include "stages/compress/method.h"

namespace espalier::compress {
namespace {

class LowRank : public Method {
 public:
  void read(const config::Section& section, Settings& settings) const override {
    read_truncation(section, settings);
    refuse_keys(section, {"bits", "polar"}, "low_rank stores singular vectors in float16");
    settings.bits = kHalfBits;
    settings.polar = false;
  }
  bool truncates() const override { return true; }
  EncodedMatrix encode(const Difference& difference, const Settings& settings,
                       EncodingErrors* errors) const override {
    return encode_matrix(difference, settings.bits, settings.polar, errors);
  }
};

const MethodRegistration registration{"low_rank", std::make_unique<LowRank>()};

}  // namespace
}  // namespace espalier::compress
