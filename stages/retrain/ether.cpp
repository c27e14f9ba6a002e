/// ETHER and ETHER+ (arXiv 2405.20271): W' = H_out W H_in by reflections in diagonal blocks.
///   ether       H = I - 2 u u^T, |H - I| = 2 in each block: starts as a random reflection
///   ether_plus  H = I - u u^T + v v^T, |H - I| <= sqrt(2): v = u at the start, the identity
/// u and v stand for unit vectors; trained are vectors of any length, and their length decides how
/// far one step turns them: `init` and `start_norm`.

#include <fmt/format.h>

#include <cmath>

#include "stages/retrain/turned.h"

namespace espalier::retrain {

namespace {

struct EtherOptions {
  TurnedOptions turned;
  std::vector<double> coefficients;
  bool published_start = true;  ///< query and value start shorter, as in the authors' program
  double start_norm = 0;        ///< 0: as drawn
};

class EtherMethod : public TurnedMethod {
 public:
  explicit EtherMethod(const EtherOptions& options)
      : TurnedMethod(options.turned), options_(options) {}

 protected:
  std::unique_ptr<BlockMap> map(const Target& target, int64_t width) const override {
    ReflectionOptions map;
    map.blocks = options().blocks;
    map.width = width;
    map.coefficients = options_.coefficients;
    const bool query_or_value = target.role == model::kQuery || target.role == model::kValue;
    const bool whole = options_.published_start && query_or_value;
    map.start_bound =
        std::sqrt((whole ? 1.0 : static_cast<double>(map.blocks)) / static_cast<double>(width));
    map.start_norm = options_.start_norm;
    return make_reflections(map);
  }
  int64_t parameters_of_side(int64_t width) const override {
    return width * static_cast<int64_t>(options_.coefficients.size());
  }

 private:
  EtherOptions options_;
};

EtherOptions read_options(const config::Section& section, const TurnedOptions& defaults) {
  EtherOptions options;
  options.turned = read_turned_options(section, defaults);
  options.published_start = section.choice("init", {"published", "kaiming"}) == "published";
  options.start_norm =
      section.optional_number("start_norm", {.low = 0, .low_open = true}).value_or(0);
  return options;
}

std::unique_ptr<AdapterMethod> read_ether(const config::Section& section) {
  EtherOptions options = read_options(section, {true, false, 32, 0});
  options.coefficients = {-2};
  return std::make_unique<EtherMethod>(options);
}

std::unique_ptr<AdapterMethod> read_ether_plus(const config::Section& section) {
  EtherOptions options = read_options(section, {true, true, 32, 0});
  options.coefficients = {-1, 1};
  return std::make_unique<EtherMethod>(options);
}

const std::vector<std::string> kKeys = {"side", "blocks", "dropout", "init", "start_norm"};
const AdapterRegistration ether{"ether", read_ether, kKeys};
const AdapterRegistration ether_plus{"ether_plus", read_ether_plus, kKeys};

}  // namespace

}  // namespace espalier::retrain
