#!/usr/bin/env bash
# Sets up, builds and runs every test; ends with ctest's summary and its exit code. Cold it takes
# about half an hour on two cores, most of it compiling and the tests on the real model.
#
#   launch/test.sh [ctest's arguments...]      e.g. launch/test.sh -L unit -R Sparsegpt
#
# The variables it obeys are listed at the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
asked_for_help "$@"
cd "$ESPALIER_SOURCE"

launch/setup.sh --tests
launch/build.sh --tests
launch/make_example.sh --tests

export ESPALIER_TEST_MODEL="$ESPALIER_WORK/models/smollm2-135m"
export ESPALIER_TEST_MINILM="$ESPALIER_WORK/models/minilm-l6"
export ESPALIER_TEST_TEXT="$ESPALIER_WORK/texts"
if [ -z "${ESPALIER_TEST_DATA:-}" ] && [ -d "$ESPALIER_SOURCE/../shared/data" ]; then
  ESPALIER_TEST_DATA="$(cd "$ESPALIER_SOURCE/../shared/data" && pwd)"
  export ESPALIER_TEST_DATA
fi
# Tests on several ranks and on the real model declare two processors, so that two at a time are
# never too many for a laptop.
exec ctest --test-dir "$ESPALIER_BUILD" --output-on-failure -j2 "$@"
