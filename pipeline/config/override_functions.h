#pragma once
/// The functions of Hydra's override grammar: casts, sweeps, sort, shuffle, tag.

#include <string>
#include <utility>
#include <vector>

#include "pipeline/config/override.h"

namespace espalier::config {

struct Call {
  std::string name;
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

/// int float str bool choice range interval glob sort shuffle tag; anything else is a UserError
/// that lists them. A range of more than 10000 values is an error. shuffle's order is the same in
/// every run (Hydra's is not), so that a sweep can be resumed.
Value call_function(const Call& call);

/// The members of a choice or a range; of others a UserError.
std::vector<Value> sweep_members(const Sweep& sweep);

}  // namespace espalier::config
