/// Token sets that launch/prepare_data.py makes.

#include "pipeline/data/token_set.h"

#include <ATen/ATen.h>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {
namespace {

using json = nlohmann::ordered_json;

json describe(const std::filesystem::path& file) {
  const data::TokenSet set = data::TokenSet::open(file);
  int64_t tokens = 0, longest = 0, counted = 0;
  for (int64_t d = 0; d < set.documents(); ++d) {
    tokens += set.document_tokens(d);
    longest = std::max(longest, set.document_tokens(d));
    if (set.has_loss_mask())
      counted += set.loss_mask(d, 0, set.document_tokens(d)).sum().item<int64_t>();
  }
  json inspection = {{"documents", set.documents()},
                     {"tokens", tokens},
                     {"longest_document", longest},
                     {"vocabulary_size", set.vocabulary_size()},
                     {"tokenizer_checksum", set.tokenizer_checksum()},
                     {"checksum", set.checksum()}};
  if (set.has_loss_mask()) inspection["tokens_that_count"] = counted;
  if (set.questions() > 0) {
    inspection["questions"] = set.questions();
    inspection["shots"] = set.shots();
  }
  if (set.is_classification()) {
    inspection["task"] = set.task();
    inspection["classes"] = set.label_names();
  }
  return inspection;
}

const FileKind text{"text", describe}, instruction{"instruction", describe},
    choices{"choices", describe}, glue{"glue", describe};

}  // namespace
}  // namespace espalier::inspect
