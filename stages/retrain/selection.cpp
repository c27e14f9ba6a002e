#include "stages/retrain/selection.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <utility>

#include "pipeline/errors.h"

namespace espalier::retrain {

namespace {

bool glob(const std::string& pattern, const std::string& text) {
  return fnmatch(pattern.c_str(), text.c_str(), 0) == 0;
}

/// The targets, and which of them matched something.
class Globs {
 public:
  Globs(const std::vector<std::string>& patterns, std::string block_prefix)
      : patterns_(patterns), block_prefix_(std::move(block_prefix)), used_(patterns.size()) {}

  /// True for every name when there are no patterns.
  bool match(const std::string& name) {
    std::string stem = name;
    for (const char* kind : {".weight", ".bias"})
      if (stem.ends_with(kind)) stem.resize(stem.size() - std::string(kind).size());
    const std::string last = stem.substr(stem.rfind('.') + 1);
    std::string inside = stem;
    if (stem.starts_with(block_prefix_)) {
      const size_t dot = stem.find('.', block_prefix_.size());
      if (dot != std::string::npos) inside = stem.substr(dot + 1);
    }
    bool matched = patterns_.empty();
    for (size_t p = 0; p < patterns_.size(); ++p) {
      const std::string& pattern = patterns_[p];
      if (!glob(pattern, last) && !glob(pattern, inside) && !glob(pattern, stem) &&
          !glob(pattern, name))
        continue;
      matched = used_[p] = true;
    }
    return matched;
  }
  /// The first pattern that matched nothing, or null.
  const std::string* unused() const {
    const auto found = std::find(used_.begin(), used_.end(), false);
    return found == used_.end() ? nullptr : &patterns_[found - used_.begin()];
  }

 private:
  const std::vector<std::string>& patterns_;
  std::string block_prefix_;
  std::vector<bool> used_;
};

class SiteList {
 public:
  explicit SiteList(const io::Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  template <class Place>
  void in_block(Site::Kind kind, const std::string& name, int64_t block, std::vector<int64_t> shape,
                Place place) {
    sites.push_back({{kind, name, block, std::move(shape)}, place, nullptr, nullptr});
  }
  template <class Place>
  void in_ends(Site::Kind kind, const std::string& name, int64_t block, Place place) {
    if (!name.empty())
      sites.push_back({{kind, name, block, checkpoint_.info(name).shape}, nullptr, place, nullptr});
  }
  template <class Place>
  void in_relative(Site::Kind kind, const std::string& name, Place place) {
    if (!name.empty())
      sites.push_back({{kind, name, -1, checkpoint_.info(name).shape}, nullptr, nullptr, place});
  }

  std::vector<PlacedSite> sites;

 private:
  const io::Checkpoint& checkpoint_;
};

using NormPlace = model::NormWeights& (*)(model::BlockWeights&);

void add_block(SiteList& list, const model::Architecture& a, int64_t block) {
  for (const model::Linear& linear : a.linears) {
    if (!linear.bias) continue;
    list.in_block(
        Site::Kind::bias, a.bias_name(block, linear), block, {a.in_block(block, linear).out},
        [role = linear.role](model::BlockWeights& w) -> at::Tensor& { return w.bias[role]; });
  }
  const auto norm = [&](const model::Names& names, int64_t size, NormPlace place) {
    if (!names.weight.empty())
      list.in_block(Site::Kind::norm_weight, a.tensor_name(block, names.weight), block, {size},
                    [place](model::BlockWeights& w) -> at::Tensor& { return place(w).weight; });
    if (!names.bias.empty())
      list.in_block(Site::Kind::norm_bias, a.tensor_name(block, names.bias), block, {size},
                    [place](model::BlockWeights& w) -> at::Tensor& { return place(w).bias; });
  };
  norm(a.attention_norm, a.hidden,
       [](model::BlockWeights& w) -> model::NormWeights& { return w.attention_norm; });
  norm(a.feed_forward_norm, a.hidden,
       [](model::BlockWeights& w) -> model::NormWeights& { return w.feed_forward_norm; });
  norm(a.query_norm, a.head_size,
       [](model::BlockWeights& w) -> model::NormWeights& { return w.query_norm; });
  norm(a.key_norm, a.head_size,
       [](model::BlockWeights& w) -> model::NormWeights& { return w.key_norm; });
  if (!a.relative) return;
  const int64_t features = a.heads_of(block).queries() * a.head_size;
  const auto projection = [&](const model::Names& names, NormPlace place) {
    if (!names.weight.empty())
      list.in_block(Site::Kind::matrix, a.tensor_name(block, names.weight), block,
                    {features, a.hidden},
                    [place](model::BlockWeights& w) -> at::Tensor& { return place(w).weight; });
    if (!names.bias.empty())
      list.in_block(Site::Kind::bias, a.tensor_name(block, names.bias), block, {features},
                    [place](model::BlockWeights& w) -> at::Tensor& { return place(w).bias; });
  };
  projection(a.relative->key,
             [](model::BlockWeights& w) -> model::NormWeights& { return w.relative_key; });
  projection(a.relative->query,
             [](model::BlockWeights& w) -> model::NormWeights& { return w.relative_query; });
}

void add_ends(SiteList& list, const model::Architecture& a) {
  using model::Ends;
  using Kind = Site::Kind;
  const auto embedding = [&](const std::string& name, at::Tensor Ends::*place) {
    list.in_ends(Kind::embedding, name, -1,
                 [place](Ends& ends) -> at::Tensor& { return ends.*place; });
  };
  const auto norm = [&](const model::Names& names, int64_t block, model::NormWeights Ends::*norm) {
    list.in_ends(Kind::norm_weight, names.weight, block,
                 [norm](Ends& ends) -> at::Tensor& { return (ends.*norm).weight; });
    list.in_ends(Kind::norm_bias, names.bias, block,
                 [norm](Ends& ends) -> at::Tensor& { return (ends.*norm).bias; });
  };
  embedding(a.token_embedding, &Ends::token_embedding);
  embedding(a.position_embedding, &Ends::position_embedding);
  embedding(a.type_embedding, &Ends::type_embedding);
  norm(a.embedding_norm, -1, &Ends::embedding_norm);
  list.in_ends(Kind::matrix, a.project_in, -1,
               [](Ends& ends) -> at::Tensor& { return ends.project_in; });
  if (a.relative) {
    using Relative = model::RelativeEmbeddings;
    list.in_relative(Kind::embedding, a.relative->embedding,
                     [](Relative& r) -> at::Tensor& { return r.weight; });
    list.in_relative(Kind::norm_weight, a.relative->norm.weight,
                     [](Relative& r) -> at::Tensor& { return r.norm.weight; });
    list.in_relative(Kind::norm_bias, a.relative->norm.bias,
                     [](Relative& r) -> at::Tensor& { return r.norm.bias; });
  }
  norm(a.final_norm, a.blocks, &Ends::final_norm);
  list.in_ends(Kind::matrix, a.project_out, a.blocks,
               [](Ends& ends) -> at::Tensor& { return ends.project_out; });
  if (a.head != a.token_embedding)
    list.in_ends(Kind::head, a.head, a.blocks, [](Ends& ends) -> at::Tensor& { return ends.head; });
  list.in_ends(Kind::bias, a.head_bias, a.blocks,
               [](Ends& ends) -> at::Tensor& { return ends.head_bias; });
}

}  // namespace

std::vector<PlacedSite> sites_of(const io::Checkpoint& checkpoint,
                                 const model::Architecture& architecture) {
  SiteList list(checkpoint);
  for (int64_t b = 0; b < architecture.blocks; ++b) add_block(list, architecture, b);
  add_ends(list, architecture);
  return list.sites;
}

Selection select(const io::Checkpoint& checkpoint, const model::Architecture& architecture,
                 const AdapterMethod& method, const std::vector<std::string>& targets,
                 const std::vector<std::string>& head) {
  Selection selection;
  Globs globs(targets, architecture.block_prefix);
  if (method.adapts_matrices())
    for (int64_t b = 0; b < architecture.blocks; ++b)
      for (const model::Linear& linear : architecture.linears)
        if (globs.match(architecture.weight_name(b, linear)))
          selection.matrices.push_back({b, architecture.in_block(b, linear)});
  for (PlacedSite& placed : sites_of(checkpoint, architecture)) {
    const Site& site = placed.site;
    const bool of_tokens = site.kind == Site::Kind::head || site.name == architecture.head_bias;
    if (of_tokens && !head.empty()) continue;  // the other head takes their place
    if (method.trains(site) && globs.match(site.name)) selection.sites.push_back(std::move(placed));
  }
  for (const std::string& name : head) globs.match(name);

  std::vector<std::string> names;
  for (const model::Linear& linear : architecture.linears) names.push_back(linear.name);
  if (const std::string* unused = globs.unused())
    throw UserError(fmt::format(
        "retrain.targets: '{}' matches no tensor of this {} model that the method trains; its "
        "linear layers are {}",
        *unused, architecture.model_type, fmt::join(names, ", ")));
  if (selection.matrices.empty() && selection.sites.empty() && head.empty())
    throw UserError(fmt::format(
        "retrain: the method finds nothing to train in {}: a {} model with the linear "
        "layers {}, without biases where it needs them; choose another method",
        checkpoint.directory().string(), architecture.model_type, fmt::join(names, ", ")));
  return selection;
}

}  // namespace espalier::retrain
