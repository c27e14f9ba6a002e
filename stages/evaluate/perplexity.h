#pragma once
/// Perplexity: exp of the mean negative log-likelihood over consecutive segments, no overlap, every
/// predicted token counted once; the tail that fills no segment is dropped.

#include <cstdint>
#include <optional>

#include "pipeline/data/token_set.h"
#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"

namespace espalier::evaluate {

struct PerplexityTask {
  data::TokenSet set;
  int64_t sequence_length = 2048;
  std::optional<int64_t> segments;  ///< from the start; all when unset
};

struct Perplexity {
  double perplexity = 0, mean_loss = 0;
  int64_t segments = 0, tokens = 0;  ///< tokens that were predicted
};

/// How many segments the task scores. Throws UserError when the set has fewer than asked, or none.
int64_t segments_of(const PerplexityTask& task);

/// Segments are units, spread over ranks and workers; blocks are streamed, with the hidden states
/// of at most 256 MB of segments a rank at a time (less under cluster.memory_gib). Collective.
/// Throws NumericalError naming the segment when a loss is not finite.
Perplexity measure_perplexity(driver::StageContext& context, const io::Checkpoint& checkpoint,
                              const PerplexityTask& task);

}  // namespace espalier::evaluate
