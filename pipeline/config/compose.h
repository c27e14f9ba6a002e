#pragma once
/// Composition of a configuration as hydra-core composes it (Hydra 1.3, OmegaConf 2.3), from a
/// directory of YAML files, a primary name and the command line's overrides.

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/config/section.h"

namespace espalier::config {

struct Request {
  std::filesystem::path directory;     ///< --config-dir
  std::string name = "default";        ///< --config-name
  std::vector<std::string> overrides;  ///< key=value, +k=v, ++k=v, ~k, group=choice, ...
};

/// One composed run, interpolations kept; resolve() gives the values.
class Composition {
 public:
  /// The root, resolved: interpolations and resolvers replaced by their values.
  Section root() const;
  /// YAML as `--cfg job` prints it (order of the keys as Hydra's); `resolved` as with --resolve.
  std::string yaml(bool resolved) const;
  /// The same as JSON, for comparison with other programs.
  std::string json(bool resolved) const;
  /// The resolved defaults tree as `--info defaults` prints it.
  std::string defaults_list() const;
  /// Hydra's override_dirname: "k=v,k2=v2" sorted by key, without the overrides of keys that
  /// `excluded` accepts.
  std::string override_dirname(
      const std::function<bool(const std::string& key)>& excluded = {}) const;

  struct State;
  explicit Composition(std::shared_ptr<State> state) : state_(std::move(state)) {}

 private:
  std::shared_ptr<State> state_;
};

/// Throws UserError naming file and line (or the override) and the nearest known name.
Composition compose(const Request& request);

/// A sweep's members: overrides with comma lists, range(), choice(), glob() expanded into their
/// product, in Hydra's order. Without sweep syntax, one member.
std::vector<std::vector<std::string>> expand_sweep(const Request& request);

/// Text for --help: the groups, their choices, and the keys of the composed configuration.
std::string describe_groups(const std::filesystem::path& directory);

}  // namespace espalier::config
