#include "pipeline/model/heads.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/json.h"

namespace espalier::model {
namespace {

using nlohmann::json;

constexpr size_t kMostBytes = size_t{64} << 20;

std::vector<int64_t> read_block(const json& numbers, int64_t heads, const std::string& where) {
  if (!numbers.is_array() || numbers.empty())
    throw UserError(where + ": a list of the heads that stay, at least one, is expected");
  std::vector<int64_t> kept;
  for (const json& number : numbers) {
    const int64_t head = io::non_negative_integer(number);
    if (head < 0 || head >= heads || (!kept.empty() && head <= kept.back()))
      throw UserError(
          fmt::format("{}: {} is no head behind those before it; ascending numbers "
                      "below {} are expected",
                      where, number.dump().substr(0, 40), heads));
    kept.push_back(head);
  }
  return kept;
}

}  // namespace

bool BlockHeads::shared_evenly() const {
  const int64_t group = queries() / key_values();
  for (int64_t q = 0; q < queries(); ++q)
    if (key_value_of[q] != q / group) return false;
  return group * key_values() == queries();
}

BlockHeads block_heads(const std::vector<int64_t>& kept, int64_t heads, int64_t key_value_heads) {
  BlockHeads of;
  of.query = kept;
  for (const int64_t head : kept) {
    const int64_t key_value = head / (heads / key_value_heads);
    if (of.key_value.empty() || of.key_value.back() != key_value) of.key_value.push_back(key_value);
    of.key_value_of.push_back(of.key_values() - 1);
  }
  return of;
}

KeptHeads read_kept_heads(const io::Checkpoint& checkpoint, int64_t blocks, int64_t heads) {
  const auto file = io::nearest_file(checkpoint.chain(), kHeadsFile);
  if (!file) return {};
  const json content = io::parse_json(io::read_file(*file, kMostBytes), file->string());
  const auto found = content.is_object() ? content.find("heads") : content.end();
  if (found == content.end() || !found->is_array() || static_cast<int64_t>(found->size()) != blocks)
    throw UserError(fmt::format("{}: \"heads\" with a list for each of the {} blocks is expected",
                                file->string(), blocks));
  KeptHeads kept;
  for (const json& block : *found)
    kept.push_back(
        read_block(block, heads, fmt::format("{}: block {}", file->string(), kept.size())));
  return kept;
}

void write_kept_heads(const std::filesystem::path& directory, const KeptHeads& heads) {
  io::write_file(directory / kHeadsFile, json({{"heads", heads}}).dump() + "\n");
}

at::Tensor features_of(const std::vector<int64_t>& heads, int64_t size) {
  const at::Tensor first = at::tensor(heads, at::kLong) * size;
  return (first.unsqueeze(1) + at::arange(size, at::kLong)).flatten();
}

}  // namespace espalier::model
