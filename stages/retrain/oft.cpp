/// Whole blocks, the baselines of ETHER (arXiv 2405.20271): W' = W blkdiag(N).
///   oft    (arXiv 2306.07280) N = (I + S)(I - S)^-1 orthogonal, by Cayley's transform of S = (R -
///          R^T) / 2, R = 0 at the start. Its papers report half of the stored numbers: S is skew.
///   naive  N is any matrix, from the identity.

#include "stages/retrain/turned.h"

namespace espalier::retrain {

namespace {

class WholeBlocksMethod : public TurnedMethod {
 public:
  WholeBlocksMethod(const TurnedOptions& options, bool cayley)
      : TurnedMethod(options), cayley_(cayley) {}
  int64_t reported_parameters(int64_t rows, int64_t columns) const override {
    return trainable_parameters(rows, columns) / (cayley_ ? 2 : 1);
  }

 protected:
  std::unique_ptr<BlockMap> map(const Target&, int64_t width) const override {
    return make_whole_blocks({options().blocks, width, cayley_});
  }
  int64_t parameters_of_side(int64_t width) const override {
    return width * (width / options().blocks);
  }

 private:
  bool cayley_;
};

AdapterFactory read(bool cayley) {
  return [cayley](const config::Section& section) -> std::unique_ptr<AdapterMethod> {
    return std::make_unique<WholeBlocksMethod>(read_turned_options(section, {true, false, 256, 0}),
                                               cayley);
  };
}

const std::vector<std::string> kKeys = {"side", "blocks", "dropout"};
const AdapterRegistration oft{"oft", read(true), kKeys};
const AdapterRegistration naive{"naive", read(false), kKeys};

}  // namespace

}  // namespace espalier::retrain
