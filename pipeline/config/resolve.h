#pragma once
/// Interpolations and resolvers replaced by their values, as OmegaConf resolves them.

#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "pipeline/config/interpolation.h"
#include "pipeline/config/node.h"

namespace espalier::config {

/// Resolves inside one tree. The tree must not change while the resolver lives.
/// Bounded: chains of 64 interpolations, 200000 values and 16 MiB of text in all; cycles are named.
/// Resolvers: oc.env oc.decode oc.select oc.create oc.deprecated oc.dict.keys oc.dict.values.
class Resolver : private Lookup {
 public:
  /// `keep_missing`: what refers to a mandatory value that is not set (`???`) becomes missing
  /// itself, an error only for who reads it; otherwise it is an error here.
  Resolver(NodePtr root, bool keep_missing);

  /// A deep copy with no interpolation left; `???` stays missing.
  NodePtr resolved(const NodePtr& node);
  /// The node that an interpolation stands for, another node itself.
  NodePtr dereference(const NodePtr& node);
  /// The node at an absolute path, through interpolations; nullptr when it does not exist.
  NodePtr select(const std::vector<std::string>& path);

 private:
  NodePtr key(int dots, const std::vector<std::string>& path) override;
  NodePtr resolver(const std::string& name, const std::vector<NodePtr>& arguments,
                   const std::vector<std::string>& texts) override;

  NodePtr oc_select(const std::vector<NodePtr>& arguments);
  NodePtr oc_dict(const std::string& name, const std::vector<NodePtr>& arguments);
  NodePtr oc_env(const std::vector<NodePtr>& arguments);
  NodePtr select_text(const std::string& text);
  NodePtr walk(int dots, const std::vector<std::string>& path, std::string& problem);
  NodePtr start_of(int dots) const;
  void adopt(const NodePtr& node, Node* parent);
  [[noreturn]] void fail(const std::string& message) const;
  void spend(size_t values, size_t bytes);

  NodePtr root_;
  bool keep_missing_;
  std::unordered_map<const Node*, Node*> parents_;
  std::unordered_map<const Node*, NodePtr> values_;  ///< of interpolations already evaluated
  std::set<const Node*> open_containers_;
  std::vector<NodePtr> evaluating_;  ///< the interpolations being evaluated, outermost first
  std::vector<NodePtr> kept_;        ///< nodes made by resolvers, whose address parents_ holds
  size_t spent_values_ = 0, spent_bytes_ = 0;
};

/// "a.b.0" and "a[b][0]" as parts.
std::vector<std::string> split_path(const std::string& path);

}  // namespace espalier::config
