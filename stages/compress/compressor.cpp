#include "stages/compress/compressor.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/model/sequence_head.h"
#include "pipeline/random.h"
#include "stages/compress/allocation.h"
#include "stages/compress/assembly.h"
#include "stages/compress/journal.h"
#include "stages/compress/masked.h"
#include "stages/compress/method.h"
#include "stages/compress/pairs.h"
#include "stages/compress/spectrum.h"

namespace espalier::compress {
namespace {

using driver::carry_out_units;
using nlohmann::json;

/// Most steps of a completion whose factors are stored.
constexpr int kCompletionSteps = 64;
/// More values than any matrix has.
constexpr int64_t kAllThereIs = int64_t{1} << 50;

/// The capacity of the allocation, in bits of the file (budget) or in rows and columns (rank).
struct Capacity {
  int64_t total = 0;
  std::vector<int64_t> costs;  ///< of one triplet of each matrix

  double average_rank() const {
    double sum = 0;
    for (int64_t cost : costs) sum += double(cost);
    return sum > 0 ? double(total) / sum : 0;
  }
};

/// The parts of one compression; every rank holds the same values but for `whole` (root).
class Compressor {
 public:
  Compressor(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
             const std::filesystem::path& directory, const Settings& settings,
             const comm::Communicator& group, Workers& workers, const Hooks& hooks)
      : base_(base),
        fine_tuned_(fine_tuned),
        directory_(directory),
        settings_(settings),
        method_(method_of(settings.method)),
        group_(group),
        workers_(workers),
        hooks_(hooks),
        base_checksum_(driver::tensors_checksum(base, group)),
        journal_(directory / "state" / "journal", purpose(), group.is_root()) {
    group.barrier();  // the journal's directory is there
    tied_ = tied_tensors(base, fine_tuned);
    matrices_ = changed_matrices(base, fine_tuned, tied_, group, workers);
    if (!settings.fill_zeros) require_zeros(base, fine_tuned, matrices_);
    if (group.is_root()) {
      whole_ = whole_tensors(base, fine_tuned, tied_, settings.vectors);
      added_ = added_rows(base, fine_tuned, tied_);
      const model::ClassNames names = model::class_names(fine_tuned);
      if (names != model::class_names(base)) labels_ = names;
    }
    capacity_ = capacity();
  }

  json run() {
    const Allocation allocation = method_.truncates() ? allocate_adaptively() : Allocation{};
    encode(allocation.truncation_ranks);
    group_.barrier();  // every result is in the journal
    std::string metrics;
    if (group_.is_root()) metrics = finish(allocation).dump();
    return json::parse(group_.broadcast(metrics));
  }

 private:
  std::string purpose() const {
    return fmt::format(
        "{} 2\nbase {}\nfine-tuned {}\nrank {} budget {} bits {} allocation {} prior {} polar {} "
        "vectors {} dtype {} seed {}\n",
        settings_.method, base_checksum_, group_.is_root() ? fine_tuned_.fingerprint() : "",
        settings_.rank.value_or(-1), settings_.budget.value_or(-1), settings_.bits,
        settings_.allocation, settings_.prior, settings_.polar, dtype_name(settings_.vectors),
        dtype_name(settings_.dtype), settings_.seed);
  }

  Capacity capacity() const {
    Capacity capacity;
    if (!method_.truncates()) return capacity;
    for (const auto& matrix : matrices_)
      capacity.costs.push_back(
          settings_.rank
              ? matrix.rows + matrix.columns
              : std::llround(8 * bytes_of_triplet(matrix.rows, matrix.columns, settings_.bits)));
    if (settings_.rank) {
      for (int64_t cost : capacity.costs) capacity.total += *settings_.rank * cost;
      return capacity;
    }
    int64_t total[1] = {group_.is_root() ? 8 * bytes_for_matrices() : 0};
    group_.broadcast(comm::bytes_of(std::span<int64_t>(total)));
    capacity.total = total[0];
    return capacity;
  }

  int64_t budget_bytes() const {
    return static_cast<int64_t>(*settings_.budget * double(fine_tuned_.bytes()));
  }

  /// What the budget leaves for codes, scales and diagonals. On the root.
  int64_t bytes_for_matrices() const {
    std::vector<std::pair<std::string, std::vector<int64_t>>> names;
    for (const auto& matrix : matrices_) names.emplace_back(matrix.name, matrix.shape);
    std::vector<WholeTensor> other = whole_;
    other.insert(other.end(), added_.begin(), added_.end());
    const int64_t fixed = fixed_bytes(names, other, tied_, labels_);
    if (fixed > budget_bytes())
      throw UserError(
          fmt::format("compress.budget: {} of {} bytes is {} bytes, but the tensors stored whole "
                      "and the file's "
                      "own tables take up to {}; raise the budget to at least {:.4g}",
                      *settings_.budget, fine_tuned_.bytes(), budget_bytes(), fixed,
                      double(fixed) / double(fine_tuned_.bytes())));
    return budget_bytes() - fixed;
  }

  /// Singular values wanted before anything is known of the spectra.
  std::vector<int64_t> first_targets() const {
    std::vector<Spectrum> shapes;
    for (size_t i = 0; i < matrices_.size(); ++i)
      shapes.push_back({0, {}, smaller_side(i), capacity_.costs[i]});
    if (settings_.allocation == "uniform") return uniform(shapes).truncation_ranks;
    std::vector<int64_t> targets;
    for (size_t i = 0; i < matrices_.size(); ++i)
      targets.push_back(std::min(smaller_side(i), kept_vectors()));
    return targets;
  }

  int64_t smaller_side(size_t i) const { return std::min(matrices_[i].rows, matrices_[i].columns); }
  /// Vectors worth a place in the journal; the few matrices that get more ranks are decomposed
  /// again.
  int64_t kept_vectors() const {
    return 8 + 2 * static_cast<int64_t>(std::ceil(capacity_.average_rank()));
  }

  Allocation uniform(const std::vector<Spectrum>& spectra) const {
    return settings_.rank ? allocate_uniform(spectra, capacity_.total, *settings_.rank)
                          : allocate_uniform(spectra, capacity_.total);
  }

  /// Decompose, allocate, decompose further what the allocation asks more of, until it does not.
  /// Each round's targets are decided by the root and journalled.
  Allocation allocate_adaptively() {
    if (group_.is_root() && journal_.targets().size() != matrices_.size())
      journal_.write_targets(first_targets());
    for (;;) {
      targets_ =
          json::parse(group_.broadcast(group_.is_root() ? json(journal_.targets()).dump() : ""))
              .get<std::vector<int64_t>>();
      decompose_all();
      group_.barrier();
      std::string text;
      if (group_.is_root()) text = decide().dump();
      const json decision = json::parse(group_.broadcast(text));
      if (!decision["finished"].get<bool>()) continue;
      return {decision["ranks"].get<std::vector<int64_t>>(),
              decision["used"].get<int64_t>(),
              decision["gap"].get<double>(),
              {}};
    }
  }

  /// On the root: the allocation from all spectra; or new targets, written to the journal.
  json decide() {
    spectra_.clear();
    for (size_t i = 0; i < matrices_.size(); ++i)
      spectra_.push_back(
          spectrum_of(journal_.decomposition(int64_t(i), false), capacity_.costs[i]));
    const Allocation allocation =
        settings_.allocation == "uniform"
            ? uniform(spectra_)
            : allocate(settings_.allocation, spectra_, capacity_.total, settings_.prior);
    if (allocation.wants_more.empty())
      return {{"finished", true},
              {"ranks", allocation.truncation_ranks},
              {"used", allocation.used},
              {"gap", allocation.gap}};
    auto targets = targets_;
    const int64_t growth = settings_.allocation == "paper" ? 4 : 2;  // the paper's fit reaches far
    for (int64_t i : allocation.wants_more)
      targets[i] = std::min(smaller_side(i), std::max<int64_t>(growth * targets[i], 8));
    journal_.write_targets(targets);
    return {{"finished", false}};
  }

  at::Tensor delta_of(int64_t i) const {
    const std::string& name = matrices_[i].name;
    const at::Tensor delta =
        difference(base_.view(name), common_rows(fine_tuned_.view(name), matrices_[i].shape), name);
    fine_tuned_.drop(name);
    return delta;
  }
  at::Tensor mask_of(int64_t i) const {
    const MatrixPair& matrix = matrices_[i];
    return (base_.view(matrix.name) != 0).reshape({matrix.rows, matrix.columns});
  }
  /// Its factors count inside the mask alone.
  bool completes(int64_t i) const {
    return matrices_[i].mask_preserving && worth_completing(base_.view(matrices_[i].name));
  }
  uint64_t seed_of(int64_t i) const { return settings_.seed ^ stream_of(matrices_[i].name); }

  void decompose_all() {
    std::vector<double> costs;
    std::vector<int64_t> done;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      costs.push_back(matrices_[i].predicted_cost());
      done.push_back(group_.is_root() && journal_.decomposed_to(int64_t(i)) >= targets_[i]);
    }
    // A later round is of the few matrices that the allocation asks more of.
    const bool first_round = targets_ == first_targets();
    carry_out_units(
        first_round ? "matrices decomposed" : "matrices decomposed further", costs, done, group_,
        workers_, hooks_, [&](int64_t i) { decompose_one(i); }, first_round);
  }

  void decompose_one(int64_t i) const {
    if (completes(i))
      journal_.write(
          i, masked_decomposition(delta_of(i), mask_of(i), capacity_.average_rank(), seed_of(i)),
          kAllThereIs);
    else
      journal_.write(i, decompose(delta_of(i), targets_[i], kept_vectors(), seed_of(i)),
                     targets_[i]);
    base_.drop(matrices_[i].name);
  }

  /// `ranks` is empty where nothing is truncated.
  void encode(const std::vector<int64_t>& ranks) {
    std::vector<double> costs;
    std::vector<int64_t> done;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const bool left_out = method_.truncates() && ranks[i] == 0;
      costs.push_back(left_out ? 0 : matrices_[i].predicted_cost());
      done.push_back(left_out || (group_.is_root() && journal_.encoded(int64_t(i))));
    }
    carry_out_units("matrices encoded", costs, done, group_, workers_, hooks_, [&](int64_t i) {
      encode_one(i, method_.truncates() ? ranks[i] : 0);
      base_.drop(matrices_[i].name);
    });
  }

  void encode_one(int64_t i, int64_t rank) const {
    const at::Tensor base = base_.view(matrices_[i].name), delta = delta_of(i);
    Difference difference{base, delta, matrices_[i].mask_preserving, {}, {}, {}};
    EncodedResult result;
    result.energy_kept = 1;
    if (rank > 0 && completes(i)) {
      const MaskedFactors factors = complete(delta, mask_of(i), rank, kCompletionSteps, seed_of(i));
      difference.u = factors.u;
      difference.s = factors.s;
      difference.v = factors.v;
      result.energy_kept = 1 - factors.lost / delta.square().sum().item<double>();
    } else if (rank > 0) {
      Decomposition known = journal_.decomposition(i, true);
      // The same call as when it was journalled, so the values are the same bits.
      if (known.u.size(1) < rank) known = decompose(delta, targets_[i], rank, seed_of(i));
      difference.u = known.u.narrow(1, 0, rank);
      difference.s = known.values.narrow(0, 0, rank);
      difference.v = known.v.narrow(1, 0, rank);
      result.energy_kept =
          1 - lost_energy(spectrum_of(known, capacity_.costs[i]), rank) / known.energy;
    }
    result.encoded = method_.encode(difference, settings_, &result.errors);
    result.decoded = decode_matrix(result.encoded, base, settings_.polar, settings_.dtype);
    journal_.write(i, result);
  }

  /// On the root: residual.h5 and model/ from the journal, and the figures.
  json finish(const Allocation& allocation) {
    const Assembly assembly{base_,     base_checksum_, directory_,
                            journal_,  matrices_,      allocation.truncation_ranks,
                            settings_, whole_,         added_,
                            tied_,     labels_,        [this] { group_.still_working(); }};
    json metrics = assemble(assembly);
    const int64_t bytes = metrics["bytes"].get<int64_t>();
    if (settings_.budget && bytes > budget_bytes())
      throw DefectError(fmt::format("residual.h5 takes {} bytes, more than the budget of {}", bytes,
                                    budget_bytes()));
    metrics["share"] = double(bytes) / double(fine_tuned_.bytes());
    if (!method_.truncates()) return metrics;
    double lost = 0, energy = 0, error = 0;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      lost += lost_energy(spectra_[i], allocation.truncation_ranks[i]);
      energy += spectra_[i].energy;
      const double relative = metrics["matrices"][i]["relative_error"].get<double>();
      error += relative * relative * spectra_[i].energy;
    }
    metrics["relative_error"] = energy > 0 ? std::sqrt(error / energy) : 0.0;
    metrics["certificate"] = {{"energy", energy}, {"lost_energy", lost}, {"gap", nullptr}};
    if (settings_.allocation == "greedy") metrics["certificate"]["gap"] = allocation.gap;
    metrics["allocation"] = settings_.allocation;
    metrics["average_rank"] = capacity_.average_rank();
    return metrics;
  }

  const io::Checkpoint &base_, &fine_tuned_;
  std::filesystem::path directory_;
  const Settings& settings_;
  const Method& method_;
  const comm::Communicator& group_;
  Workers& workers_;
  const Hooks& hooks_;
  std::string base_checksum_;
  Journal journal_;
  std::vector<MatrixPair> matrices_;
  std::vector<WholeTensor> whole_, added_;  ///< on the root
  std::vector<TiedTensor> tied_;
  model::ClassNames labels_;  ///< on the root
  Capacity capacity_;
  std::vector<int64_t> targets_;
  std::vector<Spectrum> spectra_;
};

}  // namespace

json compress_model(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                    const std::filesystem::path& directory, const Settings& settings,
                    const comm::Communicator& group, Workers& workers, const Hooks& hooks) {
  require_comparable(base, fine_tuned);
  // The decoded tensors twice (journal and model), the spectra and the residual.
  if (group.is_root()) io::require_space(directory, 5 * fine_tuned.bytes() / 2);
  return Compressor(base, fine_tuned, directory, settings, group, workers, hooks).run();
}

}  // namespace espalier::compress
