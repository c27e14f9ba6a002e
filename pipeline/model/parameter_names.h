#pragma once
/// Which tensors of a checkpoint are parameters.

#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"

namespace espalier::model {

/// The checkpoint's tensors, sorted, without what transformers does not count as a parameter
/// either: whole numbers (positions of added terms and of tokens), scales of added terms, the
/// buffers that older files keep (causal masks of GPT-2 and GPT-NeoX, rotary frequencies), and
/// copies of a tied head. Reads what copies_of_tied_head() reads.
std::vector<std::string> parameter_names(const io::Checkpoint& checkpoint,
                                         const Architecture& architecture);

}  // namespace espalier::model
