#include "stages/retrain/merge.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pipeline/errors.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/stored_layers.h"

namespace espalier::retrain {

namespace {

void require_finite(const at::Tensor& value, const std::string& name) {
  if (!at::isfinite(value).all().item<bool>())
    throw NumericalError(
        fmt::format("{}: what was trained is not finite; lower retrain.learning_rate", name));
}

void add(MergeReport& total, const MergeReport& one) {
  total.elements += one.elements;
  total.nonzeros_before += one.nonzeros_before;
  total.nonzeros_after += one.nonzeros_after;
  total.filled += one.filled;
  total.changed += one.changed;
}

/// Counts of one merged matrix, checked.
MergeReport compare(const Target& target, const at::Tensor& merged, bool masked) {
  MergeReport report;
  const at::Tensor was_zero = target.weight.eq(0), is_zero = merged.eq(0);
  report.elements = merged.numel();
  report.nonzeros_before = merged.numel() - was_zero.sum().item<int64_t>();
  report.nonzeros_after = merged.numel() - is_zero.sum().item<int64_t>();
  report.filled = was_zero.logical_and(is_zero.logical_not()).sum().item<int64_t>();
  report.changed = merged.ne(target.weight).sum().item<int64_t>();
  if (masked && report.filled > 0)
    throw DefectError(
        fmt::format("{}: merging filled {} zeros of the mask", target.name, report.filled));
  return report;
}

MergeReport count_beside(const Target& target, const model::AddedTerms& terms) {
  MergeReport report;
  report.elements = target.weight.numel();
  report.nonzeros_before = target.weight.ne(0).sum().item<int64_t>();
  report.nonzeros_after = report.nonzeros_before;
  for (const at::Tensor& part : {terms.down, terms.up, terms.values})
    if (part.defined()) report.nonzeros_after += part.ne(0).sum().item<int64_t>();
  return report;
}

/// sum (a - b)^2 over all entries, in their order; without b sum a^2.
double square_distance(const at::Tensor& a, const at::Tensor& b = {}) {
  const at::Tensor whole_a = a.contiguous(), whole_b = b.defined() ? b.contiguous() : b;
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, a.scalar_type(), "square_distance", [&] {
    const scalar_t* left = whole_a.const_data_ptr<scalar_t>();
    const scalar_t* right = b.defined() ? whole_b.const_data_ptr<scalar_t>() : nullptr;
    for (int64_t i = 0; i < a.numel(); ++i) {
      const double difference =
          static_cast<double>(left[i]) - (right ? static_cast<double>(right[i]) : 0.0);
      sum += difference * difference;
    }
  });
  return sum;
}

/// scale up down + S, float32 [out, in].
at::Tensor dense_terms(const model::AddedTerms& terms, const at::Tensor& like) {
  at::Tensor sum = terms.low_rank()
                       ? linalg::product(terms.up, terms.down, at::kFloat).mul_(terms.scale)
                       : at::zeros(like.sizes(), at::kFloat);
  if (terms.sparse()) sum.view(-1).index_add_(0, terms.positions, terms.values);
  return sum;
}

/// Of each target, written by whoever owns its block. The sums over targets are taken in their
/// order, so that they do not depend on who that was.
struct Distances {
  explicit Distances(size_t targets)
      : weight(targets), change(targets), maps(targets), count(targets) {}
  std::vector<double> weight, change;  ///< |W|^2, |W' - W|^2
  std::vector<double> maps, count;     ///< the sum of |H - I|, and how many maps there are

  void share(const comm::Communicator& group) {
    for (std::vector<double>* values : {&weight, &change, &maps, &count})
      group.all_reduce_max(*values);  // what another rank owns is 0 here
  }
  void report(MergeReport& total) const {
    const auto sum = [](const std::vector<double>& values) {
      return std::accumulate(values.begin(), values.end(), 0.0);
    };
    if (sum(weight) > 0) total.weight_distance = std::sqrt(sum(change) / sum(weight));
    if (sum(count) > 0) total.map_distance = sum(maps) / sum(count);
  }
};

class Writer {
 public:
  Writer(const io::Checkpoint& base, const AdaptedModel& model, Merge merge)
      : base_(base), model_(model), merge_(merge), distances_(model.targets().size()) {}

  NamedTensors of_block(const std::vector<int64_t>& targets, int64_t block, MergeReport& report);
  NamedTensors of_ends() const;
  Distances& distances() { return distances_; }

 private:
  void add_matrix(int64_t t, NamedTensors& tensors, MergeReport& report);
  void add_terms(int64_t t, NamedTensors& tensors, MergeReport& report);
  at::Tensor site_value(size_t s) const {
    const at::Tensor value =
        model_.parameter(model_.first_site_parameter() + static_cast<int64_t>(s));
    require_finite(value, model_.sites()[s].site.name);
    return value.detach().to(model_.dtype()).contiguous();
  }

  const io::Checkpoint& base_;
  const AdaptedModel& model_;
  Merge merge_;
  Distances distances_;
};

void Writer::add_matrix(int64_t t, NamedTensors& tensors, MergeReport& report) {
  const Target& target = model_.targets()[t];
  const at::Tensor merged = model_.adapter().merged(t).detach().contiguous();
  require_finite(merged, target.name);
  add(report, compare(target, merged, merge_ == Merge::masked));
  distances_.weight[t] = square_distance(target.weight);
  distances_.change[t] = square_distance(merged, target.weight);
  for (const double distance : model_.adapter().map_distances(t)) {
    distances_.maps[t] += distance;
    distances_.count[t] += 1;
  }
  tensors.emplace_back(target.name, merged);
  // What was beside is in the matrix now: empty terms hide it.
  const int64_t out = merged.size(0), in = merged.size(1);
  if (model_.without_terms() && model::load_terms(base_, target.name, out, in))
    for (auto& part : model::stored_terms(target.name, {}, out, in)) tensors.push_back(part);
}

void Writer::add_terms(int64_t t, NamedTensors& tensors, MergeReport& report) {
  const Target& target = model_.targets()[t];
  const int64_t out = target.weight.size(0), in = target.weight.size(1);
  std::optional<model::AddedTerms> terms = model_.adapter().beside(t);
  if (!terms)
    throw DefectError(fmt::format("{}: the method has nothing to leave beside it", target.name));
  for (const at::Tensor& part : {terms->down, terms->up, terms->values, terms->bias})
    if (part.defined()) require_finite(part, target.name);
  distances_.weight[t] = square_distance(target.weight);
  distances_.change[t] = square_distance(dense_terms(*terms, target.weight));
  if (!model_.without_terms())
    if (const auto earlier = model::load_terms(base_, target.name, out, in))
      terms = model::sum_of_terms(*earlier, *terms);
  add(report, count_beside(target, *terms));
  for (auto& part : model::stored_terms(target.name, *terms, out, in)) tensors.push_back(part);
}

NamedTensors Writer::of_block(const std::vector<int64_t>& targets, int64_t block,
                              MergeReport& report) {
  NamedTensors tensors;
  for (const int64_t t : targets) {
    if (merge_ == Merge::beside)
      add_terms(t, tensors, report);
    else
      add_matrix(t, tensors, report);
  }
  for (size_t s = 0; s < model_.sites().size(); ++s) {
    const PlacedSite& placed = model_.sites()[s];
    if (placed.in_block && placed.site.block == block)
      tensors.emplace_back(placed.site.name, site_value(s));
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return a.second.element_size() > b.second.element_size();  // then all are aligned
  });
  return tensors;
}

NamedTensors Writer::of_ends() const {
  NamedTensors tensors;
  const std::vector<at::Tensor> head = model_.head_parameters();
  for (size_t h = 0; h < head.size(); ++h) {
    const std::string& name = model_.head()->tensors[h].name;
    require_finite(head[h], name);
    tensors.emplace_back(name, head[h].detach().contiguous());
  }
  for (size_t s = 0; s < model_.sites().size(); ++s)
    if (!model_.sites()[s].in_block)
      tensors.emplace_back(model_.sites()[s].site.name, site_value(s));
  return tensors;
}

}  // namespace

MergeReport write_model(const std::filesystem::path& directory, const io::Checkpoint& base,
                        const AdaptedModel& model, Merge merge, Workers& workers,
                        const comm::Communicator& group) {
  std::vector<std::vector<int64_t>> targets_of(model.architecture().blocks);
  for (size_t t = 0; t < model.targets().size(); ++t)
    targets_of[model.targets()[t].block].push_back(static_cast<int64_t>(t));
  Writer writer(base, model, merge);
  const int64_t ranks = group.size(), rank = group.rank(), blocks = model.architecture().blocks;
  const int64_t mine = (blocks - rank + ranks - 1) / ranks;
  std::vector<MergeReport> reports(workers.count());
  workers.for_each(std::max<int64_t>(mine, 0), [&](int64_t index, int worker) {
    const int64_t block = rank + index * ranks;
    const NamedTensors tensors = writer.of_block(targets_of[block], block, reports[worker]);
    if (!tensors.empty())
      io::write_safetensors(directory / fmt::format("block-{:05}.safetensors", block),
                            model::stored_tensors(model.architecture(), base, tensors));
  });
  if (group.is_root()) {
    const NamedTensors tensors =
        model::stored_tensors(model.architecture(), base, writer.of_ends());
    if (!tensors.empty()) io::write_safetensors(directory / "ends.safetensors", tensors);
  }
  MergeReport total;
  for (const MergeReport& report : reports) add(total, report);
  int64_t totals[5] = {total.elements, total.nonzeros_before, total.nonzeros_after, total.filled,
                       total.changed};
  group.all_reduce_sum(totals);  // also: every file is written before derived.json says so
  if (group.is_root()) io::write_derived(directory, base);
  group.barrier();
  MergeReport all{totals[0], totals[1], totals[2], totals[3], totals[4], 0, {}};
  writer.distances().share(group);
  writer.distances().report(all);
  return all;
}

}  // namespace espalier::retrain
