/// OFT (arXiv 2306.07280), as the baseline of ETHER: W' = W blkdiag(Q), Q = (I + S)(I - S)^-1 an
/// orthogonal block by Cayley's transform of S = (R - R^T) / 2, R = 0 at the start. Its papers
/// report half of the stored numbers, since S is skew.

#include "stages/retrain/turned.h"

namespace espalier::retrain {

namespace {

class OftMethod : public TurnedMethod {
 public:
  using TurnedMethod::TurnedMethod;
  int64_t reported_parameters(int64_t rows, int64_t columns) const override {
    return trainable_parameters(rows, columns) / 2;
  }

 protected:
  std::unique_ptr<BlockMap> map(const std::string&, int64_t width) const override {
    return make_whole_blocks({options().blocks, width, true});
  }
  int64_t parameters_of_side(int64_t width) const override {
    return width * (width / options().blocks);
  }
};

const AdapterRegistration registration{
    "oft",
    [](const config::Section& section) -> std::unique_ptr<AdapterMethod> {
      return std::make_unique<OftMethod>(read_turned_options(section, {true, false, 256, 0}));
    },
    {"side", "blocks", "dropout"}};

}  // namespace

}  // namespace espalier::retrain
