#include "stages/retrain/plan.h"

#include <c10/util/accumulate.h>
#include <fmt/format.h>

#include "pipeline/driver/text_table.h"

namespace espalier::retrain {
namespace {

struct Trainable {
  int64_t parameters = 0, reported = 0;  ///< really, and as the method's paper counts them
};

Trainable trainable_of(const Selection& selection, const AdapterMethod& method) {
  Trainable sum;
  for (const Matrix& matrix : selection.matrices) {
    sum.parameters += method.trainable_parameters(matrix.linear.out, matrix.linear.in);
    sum.reported += method.reported_parameters(matrix.linear.out, matrix.linear.in);
  }
  for (const PlacedSite& placed : selection.sites) {
    sum.parameters += c10::multiply_integers(placed.site.shape);
    sum.reported += c10::multiply_integers(placed.site.shape);
  }
  return sum;
}

}  // namespace

int64_t trainable_parameters(const Selection& selection, const AdapterMethod& method) {
  return trainable_of(selection, method).parameters;
}

driver::StagePlan plan_of(const Selection& selection, const model::Architecture& architecture,
                          const std::string& method_name, const AdapterMethod& method,
                          int64_t head) {
  const Trainable trainable = trainable_of(selection, method);
  std::string line =
      fmt::format("{}: {} trainable parameters at {} matrices and {} other tensors", method_name,
                  trainable.parameters, selection.matrices.size(), selection.sites.size());
  if (head > 0) line += fmt::format(", and {} of a head", head);
  if (trainable.reported != trainable.parameters)
    line += fmt::format("; its paper counts {} of them", trainable.reported);
  std::vector<driver::BlockRow> rows;
  for (const Matrix& matrix : selection.matrices) {
    const int64_t out = matrix.linear.out, in = matrix.linear.in;
    rows.push_back({matrix.block,
                    architecture.block_prefix,
                    "." + matrix.linear.name,
                    {fmt::format("{} x {}", out, in),
                     fmt::format("{}", method.trainable_parameters(out, in))}});
  }
  driver::StagePlan plan{{line}, driver::folded_rows(rows)};
  if (!rows.empty())
    plan.table.insert(plan.table.begin(), {"matrix", "shape", "trainable of each"});
  return plan;
}

}  // namespace espalier::retrain
