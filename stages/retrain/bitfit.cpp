/// BitFit (arXiv 2106.10199): only biases are trained, those of linear layers, of the output
/// embedding and, with `norms`, of the norms. No matrix changes. A model without biases leaves
/// nothing to train, which the selection of tensors refuses.

#include "stages/retrain/adapted_matrix.h"

namespace espalier::retrain {

namespace {

class BitfitMethod : public AdapterMethod {
 public:
  explicit BitfitMethod(bool norms) : norms_(norms) {}

  void check(const std::string&, int64_t, int64_t) const override {}
  nlohmann::json settings() const override { return {{"norms", norms_}}; }
  std::unique_ptr<Adapter> attach(std::vector<Target>, const AttachOptions&) const override {
    return make_matrix_adapter({});
  }
  int64_t trainable_parameters(int64_t rows, int64_t) const override { return rows; }
  bool adapts_matrices() const override { return false; }
  bool trains(const Site& site) const override {
    return site.kind == Site::Kind::bias || (norms_ && site.kind == Site::Kind::norm_bias);
  }

 private:
  bool norms_;
};

const AdapterRegistration registration{
    "bitfit",
    [](const config::Section& section) -> std::unique_ptr<AdapterMethod> {
      return std::make_unique<BitfitMethod>(section.flag_or("norms", true));
    },
    {"norms"}};

}  // namespace

}  // namespace espalier::retrain
