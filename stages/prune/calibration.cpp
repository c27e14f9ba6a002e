#include "stages/prune/calibration.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>
#include <optional>
#include <utility>

#include "pipeline/data/sampler.h"
#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/kernels.h"

namespace espalier::prune {
namespace {

const char* const kInputNames[model::kInputs] = {"attention input", "attention output",
                                                 "feed-forward input", "feed-forward middle"};

/// One unit's statistics of one input, float32: the upper triangle of its Gram [n, n], and its
/// vectors [v, n], one after another (see vectors_of).
struct UnitStatistic {
  at::Tensor gram, vectors;
  bool defined() const { return gram.defined() || vectors.defined(); }
};
using UnitStatistics = std::array<UnitStatistic, model::kInputs>;

/// Norms are one vector, the square sums; moments two, sums and sums of squared distances from the
/// sequence's mean.
int64_t vectors_of(const Needs& needs) { return (needs.norms ? 1 : 0) + (needs.moments ? 2 : 0); }

std::span<const float> values_of(const at::Tensor& t) {
  return {t.const_data_ptr<float>(), static_cast<size_t>(t.numel())};
}

/// Exact sums of one input over units.
struct InputSum {
  std::optional<comm::ExactGram> gram;
  std::optional<comm::ExactSum> vectors;

  InputSum(const Needs& needs, int64_t n, int64_t units) {
    if (needs.gram) gram.emplace(n, units);
    if (vectors_of(needs) > 0)
      vectors.emplace(std::vector<int64_t>(static_cast<size_t>(vectors_of(needs)), n), units);
  }
  void add(const UnitStatistic& unit) {
    if (gram && unit.gram.defined())
      gram->add(unit.gram.const_data_ptr<float>(), unit.gram.size(0));
    if (vectors && unit.vectors.defined()) vectors->add(values_of(unit.vectors));
  }
  /// The grid from unit 0's statistic, with 2^headroom of room for larger units.
  void set_grid(const UnitStatistic& unit_0, int64_t units, int headroom) {
    if (gram) gram->set_grid(values_of(unit_0.gram.diagonal().contiguous()), headroom);
    if (!vectors) return;
    const at::Tensor largest = unit_0.vectors.abs().amax(1).to(at::kDouble);
    const int bits =
        62 - static_cast<int>(std::ceil(std::log2(std::max<int64_t>(units, 2)))) - headroom;
    vectors->set_grid(
        std::span(largest.const_data_ptr<double>(), static_cast<size_t>(largest.numel())),
        std::min(bits, 52));
  }
  std::vector<int> exponents() const {
    std::vector<int> all;
    if (gram) all.assign(gram->exponents().begin(), gram->exponents().end());
    if (vectors) all.insert(all.end(), vectors->exponents().begin(), vectors->exponents().end());
    return all;
  }
  void set_exponents(std::span<const int> all) {
    const size_t of_gram = gram ? static_cast<size_t>(gram->n()) : 0;
    if (gram) gram->set_exponents(all.first(of_gram));
    if (vectors) vectors->set_exponents(all.subspan(of_gram));
  }
  void merge(const InputSum& other) {
    if (gram) gram->merge(*other.gram);
    if (vectors) vectors->merge(*other.vectors);
  }
  void reduce(const comm::Communicator& group) {
    if (gram) gram->reduce(group);
    if (vectors) vectors->reduce(group);
  }
  bool overflowed() const {
    return (gram && gram->overflowed()) || (vectors && vectors->overflowed());
  }
};

using Sums = std::array<std::optional<InputSum>, model::kInputs>;

std::array<bool, model::kInputs> inputs_of(const std::vector<PlannedLayer>& layers) {
  std::array<bool, model::kInputs> wanted{};
  for (const PlannedLayer& layer : layers) wanted[layer.linear.input] = true;
  return wanted;
}

std::array<int64_t, model::kInputs> input_sizes(const model::Architecture& architecture,
                                                int64_t block) {
  std::array<int64_t, model::kInputs> sizes{};
  for (const auto& linear : architecture.linears)
    sizes[linear.input] = architecture.in_block(block, linear).in;
  return sizes;
}

/// Of a block that has all heads.
std::array<int64_t, model::kInputs> widest_inputs(const model::Architecture& architecture) {
  std::array<int64_t, model::kInputs> sizes{};
  for (const auto& linear : architecture.linears) sizes[linear.input] = linear.in;
  return sizes;
}

int64_t owned_units(const Options& options, const comm::Communicator& group) {
  return std::max<int64_t>((options.units() - group.rank() + group.size() - 1) / group.size(), 0);
}

void square_sums(const at::Tensor& x, at::Tensor out) {
  model::kernels::column_square_sums(
      x.scalar_type() == at::kFloat ? model::kernels::Storage::float32
                                    : model::kernels::Storage::bfloat16,
      x.const_data_ptr(), x.size(0), x.size(1), out.data_ptr<float>());
}

// Adds one sequence's sums and squared distances from their mean to rows 0 and 1 of `out`.
void add_moments(const at::Tensor& x, at::Tensor out) {
  const auto tokens = static_cast<double>(x.size(0));
  const auto [variance, mean] = at::var_mean(x.to(at::kFloat), 0, /*unbiased=*/false);
  out[0].add_(mean, tokens);
  out[1].add_(variance, tokens);
}

/// The rows of x [tokens, n] that count, as one tensor. `counted` bool [tokens] or undefined.
at::Tensor counted_rows(const at::Tensor& x, const at::Tensor& counted) {
  return counted.defined() ? x.index({counted}) : x;
}

UnitStatistic statistic_of(const Needs& needs, const at::Tensor& x, const at::Tensor& counted,
                           int64_t length) {
  UnitStatistic unit;
  const at::Tensor rows = counted_rows(x, counted);
  const int64_t n = x.size(1);
  if (rows.size(0) == 0) return unit;
  const auto as_float = x.options().dtype(at::kFloat);
  if (needs.gram) {
    unit.gram = at::empty({n, n}, as_float);
    linalg::gram_into(unit.gram, rows);
  }
  if (vectors_of(needs) == 0) return unit;
  unit.vectors = at::zeros({vectors_of(needs), n}, as_float);
  if (needs.norms) square_sums(rows, unit.vectors[0]);
  if (!needs.moments) return unit;
  for (int64_t first = 0; first < x.size(0); first += length) {
    const at::Tensor sequence = counted_rows(
        x.narrow(0, first, length), counted.defined() ? counted.narrow(0, first, length) : counted);
    if (sequence.size(0) > 0)
      add_moments(sequence, unit.vectors.narrow(0, vectors_of(needs) - 2, 2));
  }
  return unit;
}

}  // namespace

Calibration::Calibration(const driver::RunContext& run, const Options& options,
                         const model::Architecture& architecture, const io::Checkpoint& checkpoint,
                         const Needs& needs, const std::filesystem::path& spill_directory)
    : run_(run),
      options_(options),
      architecture_(architecture),
      needs_(needs),
      rotary_(model::rotary_table(architecture, options.sequence_length)),
      hidden_states_(owned_units(options, run.group)) {
  const int rank = run.group.rank(), ranks = run.group.size();
  if (must_spill(memory_need(), run.memory_bytes))
    hidden_states_.spill_to(spill_directory, unit_bytes());
  counted_.resize(static_cast<size_t>(owned()));
  const data::TokenSet set = data::TokenSet::open(run.calibration_data);
  const model::Ends ends = model::load_ends(checkpoint, architecture, run.dtype);
  run.workers->for_each(owned(), [&](int64_t i, int) {
    c10::InferenceMode guard;
    const int64_t first = (rank + i * ranks) * options.unit;
    std::vector<at::Tensor> windows, masks;
    for (int64_t s = 0; s < sequences_of(i); ++s) {
      windows.push_back(
          data::calibration_window(set, run.seed, first + s, options.sequence_length));
      if (options.masked_tokens)
        masks.push_back(data::calibration_mask(set, run.seed, first + s, options.sequence_length));
    }
    hidden_states_.put(i, model::embed(architecture, ends, at::cat(windows), shape_of(i)));
    if (options.masked_tokens) counted_[i] = at::cat(masks);
  });
  counted_tokens_ = options.samples * options.sequence_length;
  if (!options.masked_tokens) return;
  counted_tokens_ = 0;
  for (const at::Tensor& mask : counted_) counted_tokens_ += mask.sum().item<int64_t>();
  run.group.all_reduce_sum(std::span<int64_t>(&counted_tokens_, 1));
  if (counted_tokens_ == 0)
    throw UserError(
        fmt::format("prune.tokens: loss_mask, and no token of the {} calibration sequences counts "
                    "in {}; set it "
                    "to all, or take more samples",
                    options.samples, run.calibration_data.string()));
}

int64_t Calibration::unit_bytes() const {
  return options_.unit * options_.sequence_length * architecture_.hidden *
         static_cast<int64_t>(c10::elementSize(run_.dtype));
}

/// The block as stored and in float32 with its masks, the statistics of each worker, and a unit's
/// own passage through the block (a few times its hidden states).
MemoryNeed Calibration::memory_need() const {
  constexpr int64_t kProgram = int64_t{256} << 20;  // with its libraries
  const int64_t workers = run_.workers->count();
  int64_t weights = 0, statistics = 0;
  for (const auto& linear : architecture_.linears) weights += linear.in * linear.out;
  for (const int64_t n : widest_inputs(architecture_))
    statistics += 8 * n * (vectors_of(needs_) + (needs_.gram ? n : 0));
  const auto element = static_cast<int64_t>(c10::elementSize(run_.dtype));
  return {owned() * unit_bytes(), kProgram + weights * (element + needs_.bytes_per_weight) +
                                      statistics * (workers + 1) + 8 * workers * unit_bytes()};
}

int64_t Calibration::sequences_of(int64_t owned_unit) const {
  const int64_t unit = run_.group.rank() + owned_unit * run_.group.size();
  return std::min(options_.unit, options_.samples - unit * options_.unit);
}

model::UnitShape Calibration::shape_of(int64_t owned_unit) const {
  return {sequences_of(owned_unit), options_.sequence_length, {}};
}

/// One pass over the units: every worker sums its own, on a grid that unit 0 sets.
struct Calibration::Collector {
  Calibration& calibration;
  const model::BlockWeights& block;
  int64_t block_index;
  Needs needs;
  std::array<bool, model::kInputs> wanted;
  std::array<int64_t, model::kInputs> sizes = input_sizes(calibration.architecture_, block_index);
  std::vector<Sums> sums = std::vector<Sums>(calibration.run_.workers->count());

  UnitStatistics run_unit(int64_t owned_unit, const at::Tensor& counted) const {
    c10::InferenceMode guard;
    UnitStatistics statistics;
    std::array<bool, model::kInputs> seen{};
    const bool to_the_end = wanted[model::kFeedForwardMiddle];
    const auto hook = [&](const model::Linear& linear, const at::Tensor& x,
                          const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias) -> at::Tensor {
      if (wanted[linear.input] && !std::exchange(seen[linear.input], true))
        statistics[linear.input] =
            statistic_of(needs, x, counted, calibration.options_.sequence_length);
      if (linear.role == model::kDown) return {};
      if (linear.role == model::kUp && !to_the_end) return {};
      return linalg::linear(x, weight, bias);
    };
    model::block_forward(calibration.architecture_, block,
                         calibration.hidden_states_.get(owned_unit),
                         calibration.shape_of(owned_unit), calibration.rotary_, hook);
    return statistics;
  }
  UnitStatistics run_unit(int64_t owned_unit) const {
    return run_unit(owned_unit, calibration.counted_[owned_unit]);
  }

  void add(Sums& into, const UnitStatistics& unit) const {
    for (int input = 0; input < model::kInputs; ++input) {
      if (!wanted[input]) continue;
      try {
        into[input]->add(unit[input]);
      } catch (const NumericalError& error) {
        throw NumericalError(fmt::format("block {}: {} during calibration: {}", block_index,
                                         kInputNames[input], error.what()));
      }
    }
  }

  void require_finite(const UnitStatistic& unit, int input) const {
    // Of a Gram only the upper triangle is there; what is not finite shows on its diagonal.
    for (const at::Tensor& values :
         {unit.gram.defined() ? unit.gram.diagonal() : unit.gram, unit.vectors})
      if (values.defined() && !values.isfinite().all().item<bool>())
        throw NumericalError(fmt::format(
            "block {}: {} holds NaN or Inf during calibration; check the weights of this block "
            "and the one before",
            block_index, kInputNames[input]));
  }

  /// Every rank's exponents become those of rank 0, which owns unit 0.
  void share_grid(const UnitStatistics* unit_0, int headroom) {
    const auto& run = calibration.run_;
    for (int input = 0; input < model::kInputs; ++input) {
      if (!wanted[input]) continue;
      InputSum& first = *sums[0][input];
      if (unit_0 != nullptr) {
        require_finite((*unit_0)[input], input);
        first.set_grid((*unit_0)[input], calibration.options_.units(), headroom);
      }
      std::vector<int> exponents = first.exponents();
      run.group.broadcast(comm::bytes_of(std::span(exponents)), 0);
      for (auto& worker : sums) worker[input]->set_exponents(exponents);
    }
  }

  /// False when a unit did not fit the grid.
  bool collect(int headroom) {
    const auto& run = calibration.run_;
    for (auto& worker : sums)
      for (int input = 0; input < model::kInputs; ++input)
        if (wanted[input]) worker[input].emplace(needs, sizes[input], calibration.options_.units());
    // Each worker's first unit runs while rank 0 finds the grid; it is added once the grid is
    // known.
    const int64_t held = std::min<int64_t>(calibration.owned(), run.workers->count());
    std::vector<UnitStatistics> first(static_cast<size_t>(held));
    run.workers->for_each(held, [&](int64_t i, int) { first[i] = run_unit(i); });
    // A loss mask may leave nothing of unit 0: its grid comes from all of its tokens.
    UnitStatistics whole;
    const bool masked = calibration.options_.masked_tokens;
    if (masked && run.group.is_root()) whole = run_unit(0, {});
    share_grid(!run.group.is_root() ? nullptr : masked ? &whole : &first[0], headroom);
    run.workers->for_each(held, [&](int64_t i, int worker) {
      add(sums[worker], first[i]);
      first[i] = {};
    });
    run.workers->for_each(calibration.owned() - held,
                          [&](int64_t i, int worker) { add(sums[worker], run_unit(held + i)); });
    bool fits = true;
    for (int input = 0; input < model::kInputs; ++input) {
      if (!wanted[input]) continue;
      for (size_t worker = 1; worker < sums.size(); ++worker) {
        sums[0][input]->merge(*sums[worker][input]);
        sums[worker][input].reset();
      }
      sums[0][input]->reduce(run.group);
      fits = fits && !sums[0][input]->overflowed();
    }
    return fits;
  }

  InputStatistics result(int input) {
    InputStatistics out;
    InputSum& sum = *sums[0][input];
    const auto samples = static_cast<double>(calibration.options_.samples);
    const int64_t n = sizes[input];
    if (sum.gram) {
      out.gram = at::empty({n, n}, at::kDouble);
      sum.gram->result(out.gram.data_ptr<double>(), 2.0 / samples);
    }
    if (sum.vectors) {
      std::vector<double> all(static_cast<size_t>(sum.vectors->size()));
      sum.vectors->result(std::span<double>(all));
      const double* next = all.data();
      if (needs.norms)
        for (const double* end = next + n; next != end; ++next)
          out.norms.push_back(static_cast<float>(std::sqrt(*next / samples)));
      if (needs.moments) {
        for (const double* end = next + n; next != end; ++next)
          out.means.push_back(static_cast<float>(*next / samples));
        for (const double* end = next + n; next != end; ++next)
          out.variances.push_back(
              static_cast<float>(*next / static_cast<double>(calibration.counted_tokens_)));
      }
    }
    sums[0][input].reset();
    return out;
  }
};

std::array<InputStatistics, model::kInputs> Calibration::collect(
    const model::BlockWeights& block, int64_t index, const std::vector<PlannedLayer>& layers,
    const std::function<void(const std::string&)>& say) {
  Collector collector{*this, block, index, needs_, inputs_of(layers)};
  // SmolLM2's units exceed the first by up to 2^9.7 (down projection of the first and last blocks).
  constexpr int kHeadroom = 14, kMostHeadroom = 40;
  for (int headroom = kHeadroom; !collector.collect(headroom); headroom += 8) {
    if (headroom >= kMostHeadroom)
      throw NumericalError(fmt::format(
          "block {}: calibration sequences differ by more than 2^{} in size", index, headroom));
    say(fmt::format(
        "block {}: a calibration sequence is over 2^{} times the first; collected again "
        "on a coarser grid",
        index, headroom));
  }
  std::array<InputStatistics, model::kInputs> statistics;
  for (int input = 0; input < model::kInputs; ++input)
    if (collector.wanted[input]) statistics[input] = collector.result(input);
  return statistics;
}

void Calibration::advance(const model::BlockWeights& block) {
  run_.workers->for_each(owned(), [&](int64_t i, int) {
    c10::InferenceMode guard;
    hidden_states_.put(i, model::block_forward(architecture_, block, hidden_states_.get(i),
                                               shape_of(i), rotary_, model::plain_linear()));
  });
}

}  // namespace espalier::prune
