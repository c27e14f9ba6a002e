// A baseline of ERE: every entry of the difference in b bits, one step a row.
#include "stages/compress/method.h"

namespace espalier::compress {
namespace {

class Quantization : public Method {
 public:
  void read(const config::Section& section, Settings& settings) const override {
    refuse_keys(section, {"rank", "budget", "allocation", "prior", "polar"},
                "quantization stores every entry in `bits` bits and truncates nothing");
    settings.bits = section.integer_or("bits", settings.bits, {1, 8});
    settings.polar = false;
  }
  bool truncates() const override { return false; }
  EncodedMatrix encode(const Difference& difference, const Settings& settings,
                       EncodingErrors* errors) const override {
    return encode_entries(difference, settings.bits, errors);
  }
};

const MethodRegistration registration{"quantization", std::make_unique<Quantization>()};

}  // namespace
}  // namespace espalier::compress
