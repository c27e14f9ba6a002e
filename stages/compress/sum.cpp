#include "stages/compress/sum.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>

#include "pipeline/errors.h"
#include "stages/compress/decode.h"
#include "stages/compress/model_shards.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using at::Tensor;

/// Tensor `index` of residual `residual`'s plan.
struct Part {
  size_t residual, index;
};

class Sum {
 public:
  Sum(const io::Checkpoint& base, const Summands& summands) : base_(base), summands_(summands) {
    residuals_.reserve(summands.files.size());
    for (const fs::path& file : summands.files) {
      residuals_.push_back(read_residual(file));
      require_base(base, residuals_.back(), file);
      if (residuals_.back().dtype != dtype())
        throw UserError(
            fmt::format("{}: decodes to {}, but {} to {}; residuals that are added "
                        "must agree",
                        file.string(), dtype_name(residuals_.back().dtype),
                        summands.files[0].string(), dtype_name(dtype())));
    }
    for (size_t k = 0; k < residuals_.size(); ++k) {
      decoders_.emplace_back(base, residuals_[k]);
      for (size_t i = 0; i < decoders_[k].plan().size(); ++i)
        parts_[decoders_[k].plan()[i].name].push_back({k, i});
    }
    for (const auto& [name, parts] : parts_) plan_.push_back(plan_of(name, parts));
  }

  at::ScalarType dtype() const { return residuals_[0].dtype; }
  const std::vector<io::TensorPlan>& plan() const { return plan_; }

  /// Of the residuals that name the classes, which must agree.
  model::ClassNames labels() const {
    std::optional<size_t> naming;
    for (size_t k = 0; k < residuals_.size(); ++k) {
      if (!residuals_[k].labels) continue;
      if (naming && residuals_[*naming].labels != residuals_[k].labels)
        throw UserError(fmt::format(
            "{}: its classes are {}, those of {} are {}; residuals that are added must agree",
            summands_.files[k].string(), fmt::join(*residuals_[k].labels, ", "),
            summands_.files[*naming].string(), fmt::join(*residuals_[*naming].labels, ", ")));
      naming = k;
    }
    return naming ? residuals_[*naming].labels : std::nullopt;
  }

  Tensor tensor(size_t i) const {
    const std::string& name = plan_[i].name;
    const std::vector<Part>& parts = parts_.at(name);
    if (parts.size() == 1 && weight_of(parts[0]) == 1) return decode(parts[0], dtype());
    const bool floating = at::isFloatingType(plan_[i].dtype);
    if (!base_.has(name) || !floating) return same_of_all(name, parts, 0);
    const int64_t rows = plan_[i].shape.empty() ? 0 : base_.info(name).shape[0];
    Tensor sum = added(name, parts, rows);
    if (rows < (plan_[i].shape.empty() ? 0 : plan_[i].shape[0]))
      sum = at::cat({sum, same_of_all(name, parts, rows).to(at::kDouble)});
    return sum.to(plan_[i].dtype).contiguous();
  }

 private:
  const io::TensorPlan& planned(const Part& part) const {
    return decoders_[part.residual].plan()[part.index];
  }
  Tensor decode(const Part& part, at::ScalarType floating) const {
    return decoders_[part.residual].decode(part.index, floating);
  }
  double weight_of(const Part& part) const {
    return summands_.weights.empty() ? 1 : summands_.weights[part.residual];
  }

  /// The largest of the shapes: a residual may leave out rows that another adds.
  io::TensorPlan plan_of(const std::string& name, const std::vector<Part>& parts) const {
    io::TensorPlan plan = planned(parts[0]);
    for (const Part& part : parts) {
      const io::TensorPlan& other = planned(part);
      const bool comparable =
          other.shape.size() == plan.shape.size() && other.dtype == plan.dtype &&
          std::equal(other.shape.begin() + !other.shape.empty(), other.shape.end(),
                     plan.shape.begin() + !plan.shape.empty());
      if (!comparable)
        throw UserError(fmt::format(
            "{}: is [{}] in {}, but [{}] in {}; such residuals cannot be "
            "added",
            name, fmt::join(plan.shape, ", "), summands_.files[parts[0].residual].string(),
            fmt::join(other.shape, ", "), summands_.files[part.residual].string()));
      if (!plan.shape.empty()) plan.shape[0] = std::max(plan.shape[0], other.shape[0]);
    }
    return plan;
  }

  /// The rows that the base has, float64.
  Tensor added(const std::string& name, const std::vector<Part>& parts, int64_t rows) const {
    const Tensor base = base_.view(name).to(at::kDouble);
    Tensor sum = base.clone();
    for (const Part& part : parts) {
      const Tensor decoded = decode(part, at::kDouble);
      const Tensor common = decoded.dim() == 0 ? decoded : decoded.narrow(0, 0, rows);
      sum.add_(common - base, weight_of(part));
    }
    base_.drop(name);
    return sum;
  }

  /// The rows behind the first `rows`, which all residuals that have them must agree on.
  Tensor same_of_all(const std::string& name, const std::vector<Part>& parts, int64_t rows) const {
    Tensor found;
    size_t holder = 0;
    for (const Part& part : parts) {
      Tensor decoded = decode(part, dtype());
      if (rows > 0) {
        if (decoded.size(0) == rows) continue;
        decoded = decoded.narrow(0, rows, decoded.size(0) - rows);
      }
      if (found.defined() && !at::equal(found, decoded))
        throw UserError(fmt::format(
            "{}: {} and {} both hold what the base does not have, and hold different values; only "
            "differences to the base can be added",
            name, summands_.files[holder].string(), summands_.files[part.residual].string()));
      if (!found.defined()) holder = part.residual;
      found = decoded;
    }
    return found;
  }

  const io::Checkpoint& base_;
  const Summands& summands_;
  std::vector<Residual> residuals_;
  std::vector<Decoder> decoders_;
  std::map<std::string, std::vector<Part>> parts_;
  std::vector<io::TensorPlan> plan_;
};

}  // namespace

at::ScalarType write_sum(const io::Checkpoint& base, const Summands& summands,
                         const fs::path& directory, const std::function<void()>& still_working) {
  const Sum sum(base, summands);
  const auto tensor = [&](size_t i) {
    still_working();
    return sum.tensor(i);
  };
  write_changed_model(base, sum.plan(), tensor, sum.labels(), directory);
  return sum.dtype();
}

}  // namespace espalier::compress
