#!/usr/bin/env bash
# Configures and builds with CMake.
#
#   launch/build.sh [--tests] [target...]      default target: espalier; with --tests: everything
#
# The variables it obeys are listed at the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
asked_for_help "$@"

tests=OFF
if [ "${1:-}" = --tests ]; then
  tests=ON
  shift
fi
for target in "$@"; do
  case "$target" in -*) fail "build.sh: $target is not --tests, which comes first; see --help" ;; esac
done
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  if [ "$tests" = ON ]; then targets=(all); else targets=(espalier); fi
fi

python="$ESPALIER_VENV/bin/python"
settings=(-DESPALIER_LIBTORCH="$(libtorch_folder)" -DESPALIER_PYTHON="$python")
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

configure() {
  cmake -S "$ESPALIER_SOURCE" -B "$ESPALIER_BUILD" "${generator[@]}" "${settings[@]}" "-DESPALIER_TESTS=$tests"
}
# Configuring takes seconds; it is due when the settings or the set of files change, and CMake sees
# the latter by itself. A folder that has the tests keeps them.
configured="$ESPALIER_BUILD/.espalier-settings"
wanted="${settings[*]}"
if [ "$tests" = OFF ] && [ "$(cat "$configured" 2>/dev/null)" = "$wanted ON" ]; then tests=ON; fi
if [ "$(cat "$configured" 2>/dev/null)" != "$wanted $tests" ] || [ ! -e "$ESPALIER_BUILD/CMakeCache.txt" ]; then
  step "configure" configure
  printf '%s\n' "$wanted $tests" >"$configured"
fi

started=$SECONDS
if [ -t 1 ]; then
  cmake --build "$ESPALIER_BUILD" --parallel "$ESPALIER_JOBS" --target "${targets[@]}"
else
  step "build" cmake --build "$ESPALIER_BUILD" --parallel "$ESPALIER_JOBS" --target "${targets[@]}"
fi
[ ! -t 1 ] || say "build: done in $((SECONDS - started)) s"
