/// The unconstrained baseline of ETHER (arXiv 2405.20271): W' = W blkdiag(N), N any blocks, from
/// the identity.

#include "stages/retrain/turned.h"

namespace espalier::retrain {

namespace {

class NaiveMethod : public TurnedMethod {
 public:
  using TurnedMethod::TurnedMethod;

 protected:
  std::unique_ptr<BlockMap> map(const std::string&, int64_t width) const override {
    return make_whole_blocks({options().blocks, width, false});
  }
  int64_t parameters_of_side(int64_t width) const override {
    return width * (width / options().blocks);
  }
};

const AdapterRegistration registration{
    "naive",
    [](const config::Section& section) -> std::unique_ptr<AdapterMethod> {
      return std::make_unique<NaiveMethod>(read_turned_options(section, {true, false, 256, 0}));
    },
    {"side", "blocks", "dropout"}};

}  // namespace

}  // namespace espalier::retrain
