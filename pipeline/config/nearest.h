#pragma once
/// "did you mean": the known name nearest to a misspelt one by edit distance.

#include <string>
#include <vector>

namespace espalier::config {

/// The nearest of `known`, or "" when none is near (more than a third of the letters differ).
std::string nearest(const std::string& name, const std::vector<std::string>& known);
/// "; did you mean X?" or "; known: a, b, c" or "" when nothing is known.
std::string suggestion(const std::string& name, const std::vector<std::string>& known);
std::string join(const std::vector<std::string>& parts, const std::string& separator);

}  // namespace espalier::config
