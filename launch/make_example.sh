#!/usr/bin/env bash
# Makes the example's model, text and token sets under ESPALIER_WORK; what is there is left alone.
#
#   launch/make_example.sh [--tests]      with --tests also the second model that only the tests read
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
asked_for_help "$@"
python="$ESPALIER_VENV/bin/python"
scripts="$ESPALIER_SOURCE/launch"
wanted=(smollm2:smollm2-135m)
case "${1:-}" in
  "") ;;
  --tests) wanted+=(minilm:minilm-l6) ;;
  *) fail "make_example.sh: $1 is not --tests" ;;
esac
models="$ESPALIER_WORK/models" texts="$ESPALIER_WORK/texts" data="$ESPALIER_WORK/data"

for model in "${wanted[@]}"; do
  if [ -e "$models/${model#*:}/config.json" ]; then
    say "model ${model#*:}: there"
  else
    step "model ${model#*:}" "$python" "$scripts/make_model.py" "${model%%:*}" "$models/${model#*:}"
  fi
done
if [ -e "$texts/train.txt" ] && [ -e "$texts/calibration.txt" ] && [ -e "$texts/heldout.txt" ]; then
  say "text: there"
else
  step "text" "$python" "$scripts/make_text.py" "$texts" --sources "$ESPALIER_WORK/python-docs"
fi
"$scripts/tokenize.sh" "$models/smollm2-135m" "$texts" "$data"
