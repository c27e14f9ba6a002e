#!/usr/bin/env bash
# Turns TEXTS/{calibration,train,heldout}.txt into token sets of the same names.
#
#   launch/tokenize.sh CHECKPOINT TEXTS DATA
#
# A set is made again when its text or the tokenizer is newer than it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# = 3 ] || fail "tokenize.sh takes three folders: CHECKPOINT TEXTS DATA"
checkpoint="$1" texts="$2" data="$3"

for part in calibration train heldout; do
  set_file="$data/$part.h5"
  if [ "$set_file" -nt "$texts/$part.txt" ] && [ "$set_file" -nt "$checkpoint/tokenizer.json" ]; then
    say "data $part: there"
  else
    step "data $part" "$ESPALIER_VENV/bin/python" "$ESPALIER_SOURCE/launch/prepare_data.py" \
      --tokenizer "$checkpoint" --format text --input "$texts/$part.txt" --output "$set_file"
  fi
done
