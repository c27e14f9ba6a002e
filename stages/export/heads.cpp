#include "stages/export/heads.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/driver/spread.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/model/head_slice.h"

namespace espalier::exporting {
namespace {

namespace fs = std::filesystem;
using model::Architecture;
using model::BlockHeads;

/// LlamaConfig takes no heads that do not divide the hidden size, although it has head_dim; those
/// of Mistral, Qwen and Gemma do.
bool config_takes(const Architecture& a, int64_t queries) {
  return a.model_type != "llama" || a.hidden % queries == 0;
}

bool config_can_say(const Architecture& a) {
  if (!a.states_head_size) return false;
  const BlockHeads first = a.heads_of(0);
  if (!config_takes(a, first.queries())) return false;
  for (int64_t block = 0; block < a.blocks; ++block) {
    const BlockHeads heads = a.heads_of(block);
    if (!heads.shared_evenly() || heads.queries() != first.queries() ||
        heads.key_values() != first.key_values())
      return false;
  }
  return true;
}

int64_t missing_heads(const Architecture& a) {
  int64_t missing = 0;
  for (int64_t block = 0; block < a.blocks; ++block)
    missing += a.heads - a.heads_of(block).queries();
  return missing;
}

/// A model derived from this one with zeros for the heads that are gone.
io::Checkpoint with_zeros(const driver::StageContext& context, const io::Checkpoint& checkpoint,
                          const Architecture& a) {
  c10::InferenceMode guard;
  const comm::Communicator& group = context.run.group;
  const fs::path directory = context.state_directory() / "whole";
  Architecture whole = a;
  whole.kept_heads.clear();
  for (int64_t block = group.rank(); block < a.blocks; block += group.size())
    io::write_safetensors(directory / fmt::format("block-{:05}.safetensors", block),
                          model::with_heads(checkpoint, a, whole, block));
  group.barrier();
  if (group.is_root()) {
    model::KeptHeads all;
    for (int64_t block = 0; block < a.blocks; ++block) all.push_back(whole.heads_of(block).query);
    model::write_kept_heads(directory, all);
  }
  driver::write_derived(directory, checkpoint, group);
  return io::Checkpoint::open(directory);
}

}  // namespace

HeadsExport export_heads(const driver::StageContext& context, const io::Checkpoint& checkpoint) {
  HeadsExport result{checkpoint, nlohmann::json::object(), ""};
  if (!model::knows_architecture(checkpoint)) return result;
  const Architecture a = model::read_architecture(checkpoint);
  const int64_t missing = missing_heads(a);
  if (missing == 0) return result;
  const std::string count = fmt::format("{} of {} heads", missing, a.heads * a.blocks);
  if (config_can_say(a)) {
    const BlockHeads heads = a.heads_of(0);
    result.config_keys = {{"num_attention_heads", heads.queries()},
                          {"num_key_value_heads", heads.key_values()},
                          {"head_dim", a.head_size}};
    result.sentence = fmt::format(
        "{} are absent: config.json says num_attention_heads {} and "
        "num_key_value_heads {}",
        count, heads.queries(), heads.key_values());
    return result;
  }
  result.model = with_zeros(context, checkpoint, a);
  result.sentence = fmt::format(
      "{} are zeros in the export: {}, so their rows and columns are written in full shape", count,
      a.states_head_size
          ? "config.json says heads that are as many in every block, share key/value heads evenly "
            "and, in a llama, divide hidden_size"
          : fmt::format("config.json of {} cannot say that heads are missing", a.model_type));
  return result;
}

}  // namespace espalier::exporting
