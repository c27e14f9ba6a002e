#include "stages/prune/calibration.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>
#include <functional>

#include "pipeline/data/sampler.h"
#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/kernels.h"

namespace espalier::prune {
namespace {

const char* const kInputNames[model::kInputs] = {"attention input", "attention output",
                                                 "feed-forward input", "feed-forward middle"};

/// One unit's statistic of one input: a Gram [n, n] or square sums [n], float32.
using UnitStatistics = std::array<at::Tensor, model::kInputs>;

bool wants_gram(const Options& options) { return options.method == Method::sparsegpt; }

/// Exact sums of one input over units: the Gram's or the square sums'.
struct InputSum {
  std::optional<comm::ExactGram> gram;
  std::optional<comm::ExactSum> squares;

  InputSum(bool as_gram, int64_t n, int64_t units) {
    if (as_gram)
      gram.emplace(n, units);
    else
      squares.emplace(std::vector<int64_t>{n}, units);
  }
  void add(const at::Tensor& unit) {
    if (gram)
      gram->add(unit.const_data_ptr<float>(), unit.size(0));
    else
      squares->add(std::span(unit.const_data_ptr<float>(), static_cast<size_t>(unit.numel())));
  }
  void set_exponents(std::span<const int> exponents) {
    gram ? gram->set_exponents(exponents) : squares->set_exponents(exponents);
  }
  std::span<const int> exponents() const { return gram ? gram->exponents() : squares->exponents(); }
  /// The grid from unit 0's statistic, with 2^headroom of room for larger units.
  void set_grid(const at::Tensor& unit_0, int64_t units, int headroom) {
    if (gram) {
      const at::Tensor diagonal = unit_0.diagonal().contiguous();
      gram->set_grid(std::span(diagonal.const_data_ptr<float>(), static_cast<size_t>(gram->n())),
                     headroom);
      return;
    }
    const double largest = unit_0.max().item<float>();
    const int bits =
        62 - static_cast<int>(std::ceil(std::log2(std::max<int64_t>(units, 2)))) - headroom;
    squares->set_grid(std::span(&largest, 1), std::min(bits, 52));
  }
  void merge(const InputSum& other) {
    gram ? gram->merge(*other.gram) : squares->merge(*other.squares);
  }
  void reduce(const comm::Communicator& group) {
    gram ? gram->reduce(group) : squares->reduce(group);
  }
  bool overflowed() const { return gram ? gram->overflowed() : squares->overflowed(); }
};

using Sums = std::array<std::optional<InputSum>, model::kInputs>;

std::array<bool, model::kInputs> inputs_of(const std::vector<const model::Linear*>& layers) {
  std::array<bool, model::kInputs> wanted{};
  for (const model::Linear* layer : layers) wanted[layer->input] = true;
  return wanted;
}

std::array<int64_t, model::kInputs> input_sizes(const model::Architecture& architecture) {
  std::array<int64_t, model::kInputs> sizes{};
  for (const auto& linear : architecture.linears) sizes[linear.input] = linear.in;
  return sizes;
}

int64_t owned_units(const Options& options, const comm::Communicator& group) {
  return std::max<int64_t>((options.units() - group.rank() + group.size() - 1) / group.size(), 0);
}

at::Tensor statistic_of(const Options& options, const at::Tensor& x) {
  const auto options_float = x.options().dtype(at::kFloat);
  if (wants_gram(options)) {
    at::Tensor gram = at::empty({x.size(1), x.size(1)}, options_float);
    linalg::gram_into(gram, x);
    return gram;
  }
  at::Tensor sums = at::empty({x.size(1)}, options_float);
  model::kernels::column_square_sums(
      x.scalar_type() == at::kFloat ? model::kernels::Storage::float32
                                    : model::kernels::Storage::bfloat16,
      x.const_data_ptr(), x.size(0), x.size(1), sums.data_ptr<float>());
  return sums;
}

}  // namespace

Calibration::Calibration(const driver::RunContext& run, const Options& options,
                         const model::Architecture& architecture, const io::Checkpoint& checkpoint,
                         const std::filesystem::path& spill_directory)
    : run_(run),
      options_(options),
      architecture_(architecture),
      rotary_(model::rotary_table(architecture, options.sequence_length)),
      hidden_states_(owned_units(options, run.group)) {
  const int rank = run.group.rank(), ranks = run.group.size();
  if (must_spill(memory_need(), run.memory_bytes))
    hidden_states_.spill_to(spill_directory, unit_bytes());
  const data::TokenSet set = data::TokenSet::open(run.calibration_data);
  const model::Ends ends = model::load_ends(checkpoint, architecture, run.dtype);
  run.workers->for_each(owned(), [&](int64_t i, int) {
    c10::InferenceMode guard;
    const int64_t first = (rank + i * ranks) * options.unit;
    std::vector<at::Tensor> windows;
    for (int64_t s = 0; s < sequences_of(i); ++s)
      windows.push_back(
          data::calibration_window(set, run.seed, first + s, options.sequence_length));
    hidden_states_.put(i, model::embed(architecture, ends, at::cat(windows), shape_of(i)));
  });
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
  for (const int64_t n : input_sizes(architecture_))
    statistics += 8 * n * (wants_gram(options_) ? n : 1);
  const auto element = static_cast<int64_t>(c10::elementSize(run_.dtype));
  return {owned() * unit_bytes(), kProgram + weights * (element + 5) + statistics * (workers + 1) +
                                      8 * workers * unit_bytes()};
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
  std::array<bool, model::kInputs> wanted;
  std::array<int64_t, model::kInputs> sizes = input_sizes(calibration.architecture_);
  std::vector<Sums> sums = std::vector<Sums>(calibration.run_.workers->count());

  UnitStatistics run_unit(int64_t owned_unit) const {
    c10::InferenceMode guard;
    UnitStatistics statistics;
    const bool to_the_end = wanted[model::kFeedForwardMiddle];
    const auto hook = [&](const model::Linear& linear, const at::Tensor& x,
                          const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias) -> at::Tensor {
      if (wanted[linear.input] && !statistics[linear.input].defined())
        statistics[linear.input] = statistic_of(calibration.options_, x);
      if (linear.role == model::kDown) return {};
      if (linear.role == model::kUp && !to_the_end) return {};
      return linalg::linear(x, weight, bias);
    };
    model::block_forward(calibration.architecture_, block,
                         calibration.hidden_states_.get(owned_unit),
                         calibration.shape_of(owned_unit), calibration.rotary_, hook);
    return statistics;
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

  /// Every rank's exponents become those of rank 0, which owns unit 0.
  void share_grid(const UnitStatistics* unit_0, int headroom) {
    const auto& run = calibration.run_;
    for (int input = 0; input < model::kInputs; ++input) {
      if (!wanted[input]) continue;
      InputSum& first = *sums[0][input];
      std::vector<int> exponents(wants_gram(calibration.options_) ? sizes[input] : 1);
      if (unit_0 != nullptr) {
        // Of a Gram only the upper triangle is there; what is not finite shows on its diagonal.
        const at::Tensor& unit = (*unit_0)[input];
        if (!(unit.dim() == 2 ? unit.diagonal() : unit).isfinite().all().item<bool>())
          throw NumericalError(fmt::format(
              "block {}: {} holds NaN or Inf during calibration; check the weights of this block "
              "and the one before",
              block_index, kInputNames[input]));
        first.set_grid((*unit_0)[input], calibration.options_.units(), headroom);
        std::copy(first.exponents().begin(), first.exponents().end(), exponents.begin());
      }
      run.group.broadcast(comm::bytes_of(std::span(exponents)), 0);
      for (auto& worker : sums) worker[input]->set_exponents(exponents);
    }
  }

  /// False when a unit did not fit the grid.
  bool collect(int headroom) {
    const auto& run = calibration.run_;
    for (auto& worker : sums)
      for (int input = 0; input < model::kInputs; ++input)
        if (wanted[input])
          worker[input].emplace(wants_gram(calibration.options_), sizes[input],
                                calibration.options_.units());
    // Each worker's first unit runs while rank 0 finds the grid; it is added once the grid is
    // known.
    const int64_t held = std::min<int64_t>(calibration.owned(), run.workers->count());
    std::vector<UnitStatistics> first(static_cast<size_t>(held));
    run.workers->for_each(held, [&](int64_t i, int) { first[i] = run_unit(i); });
    share_grid(run.group.is_root() ? &first[0] : nullptr, headroom);
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
    if (sum.gram) {
      out.gram = at::empty({sizes[input], sizes[input]}, at::kDouble);
      sum.gram->result(out.gram.data_ptr<double>(), 2.0 / samples);
    } else {
      std::vector<double> squares(sizes[input]);
      sum.squares->result(std::span<double>(squares));
      for (double square : squares)
        out.norms.push_back(static_cast<float>(std::sqrt(square / samples)));
    }
    sums[0][input].reset();
    return out;
  }
};

std::array<InputStatistics, model::kInputs> Calibration::collect(
    const model::BlockWeights& block, int64_t index,
    const std::vector<const model::Linear*>& layers,
    const std::function<void(const std::string&)>& say) {
  Collector collector{*this, block, index, inputs_of(layers)};
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
