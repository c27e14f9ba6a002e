/// Composes configurations for test_hydra.py: reads one JSON-free request a block from standard
/// input
///   directory \n name \n plain|resolved|sweep|defaults|dirname|yaml \n override ... \n (empty
///   line)
/// and prints one line for each: "ok " and the JSON or text (newlines escaped), or "error " and the
/// message.

#include <iostream>
#include <string>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"

namespace {

using espalier::config::Composition;
using espalier::config::Request;

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '\n') {
      result += "\\n";
    } else if (c == '"' || c == '\\') {
      result += std::string("\\") + c;
    } else if (c == '\t') {
      result += "\\t";
    } else {
      result += c;
    }
  }
  return result + "\"";
}

std::string sweep(const Request& request) {
  std::string result = "[";
  for (const auto& member : espalier::config::expand_sweep(request)) {
    result += result.size() > 1 ? ",[" : "[";
    for (size_t i = 0; i < member.size(); ++i) result += (i ? "," : "") + quoted(member[i]);
    result += "]";
  }
  return result + "]";
}

std::string answer(const Request& request, const std::string& mode) {
  if (mode == "sweep") return sweep(request);
  Composition composition = espalier::config::compose(request);
  if (mode == "defaults") return quoted(composition.defaults_list());
  if (mode == "dirname") return quoted(composition.override_dirname());
  if (mode == "yaml") return quoted(composition.yaml(false));
  return composition.json(mode == "resolved");
}

}  // namespace

int main() {
  std::string directory, mode, line;
  while (std::getline(std::cin, directory)) {
    Request request;
    request.directory = directory;
    std::getline(std::cin, request.name);
    std::getline(std::cin, mode);
    while (std::getline(std::cin, line) && !line.empty()) request.overrides.push_back(line);
    try {
      std::string text = answer(request, mode);
      std::cout << "ok " << text << std::endl;
    } catch (const espalier::Error& error) {
      std::cout << "error " << quoted(error.what()) << std::endl;
    }
  }
}
