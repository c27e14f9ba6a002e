#pragma once
/// The three kinds of error a run can end with, and the exit code of each.
///
/// Every message names the place (file and line, key, block, matrix), the value found, the legal
/// values, and the way out. The driver prints `espalier: <message>` once and exits with
/// `exit_code`.

#include <stdexcept>
#include <string>

namespace espalier {

inline constexpr int kExitConfiguration = 2;  ///< the user's configuration or data
inline constexpr int kExitEnvironment = 3;    ///< disk, memory, network, a rank that vanished
inline constexpr int kExitDefect = 4;         ///< a defect of espalier itself
inline constexpr int kExitRequeue = 75;       ///< stopped by a signal, state saved: start again

class Error : public std::runtime_error {
 public:
  Error(int exit_code, const std::string& message)
      : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

/// The configuration or the data given is wrong; the person can mend it.
struct UserError : Error {
  explicit UserError(const std::string& message) : Error(kExitConfiguration, message) {}
};

/// A statistic, loss or factor is not usable; names block, matrix and step.
struct NumericalError : Error {
  explicit NumericalError(const std::string& message) : Error(kExitConfiguration, message) {}
};

/// The machine does not give what is needed: disk full, directory read-only, peer gone.
struct EnvironmentError : Error {
  explicit EnvironmentError(const std::string& message) : Error(kExitEnvironment, message) {}
};

/// Something that cannot happen happened.
struct DefectError : Error {
  explicit DefectError(const std::string& message) : Error(kExitDefect, message) {}
};

/// SIGTERM or SIGUSR1 arrived, the state is on disk: start the same command again to go on.
struct Requeue : Error {
  explicit Requeue(const std::string& message) : Error(kExitRequeue, message) {}
};

}  // namespace espalier
