#!/usr/bin/env bash
# Makes the example's models, text and token sets under ESPALIER_WORK; what is there is left alone.
#
#   launch/make_example.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python="$ESPALIER_VENV/bin/python"
scripts="$ESPALIER_SOURCE/launch"
models="$ESPALIER_WORK/models" texts="$ESPALIER_WORK/texts" data="$ESPALIER_WORK/data"

for model in smollm2:smollm2-135m minilm:minilm-l6; do
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
