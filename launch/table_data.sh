#!/usr/bin/env bash
# Models and token sets of the tables (launch/tables.sh) in FOLDER; what is there and newer than its source is kept.
#
#   launch/table_data.sh MODELS DATA FOLDER
#
#   MODELS  a folder with minilm-l6 and smollm2-135m, as launch/make_example.sh --tests makes them
#   DATA    glue/, commonsense/ and wikitext-2/, as launch/tables.sh describes them
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# = 3 ] || fail "table_data.sh takes three folders: MODELS DATA FOLDER"
models="$(realpath -- "$1")" data="$(realpath -- "$2")" folder="$3"
sst2_rows=8000   # of 67,349
questions=120    # of each task, from the start

# prepared NAME MODEL SOURCES... -- ARGUMENTS...: the set FOLDER/NAME.h5 by prepare_data.py from SOURCES.
prepared() {
  local name="$1" model="$2" source fresh=1
  local set_file="$folder/$name.h5" sources=()
  shift 2
  while [ "$1" != -- ]; do sources+=("$1"); shift; done
  shift
  for source in "${sources[@]}" "$model/tokenizer.json"; do
    [ -r "$source" ] || fail "$source cannot be read; see launch/tables.sh --help for what --data holds"
    [ "$set_file" -nt "$source" ] || fresh=0
  done
  [ "$fresh" = 0 ] || return 0
  step "table data $name" "$ESPALIER_VENV/bin/python" "$ESPALIER_SOURCE/launch/prepare_data.py" \
    --tokenizer "$model" --input "${sources[@]}" --output "$set_file" "$@"
}

# first_records COUNT SOURCE: a copy with the first COUNT records of a JSON list, or of a TSV with a header.
first_records() {
  local cut="$folder/cut/$(basename "$(dirname "$2")")-$1.${2##*.}"
  if [ ! "$cut" -nt "$2" ]; then
    mkdir -p "$folder/cut"
    case "$2" in
      *.json) "$ESPALIER_VENV/bin/python" -c 'import json, sys
json.dump(json.load(open(sys.argv[1], encoding="utf-8"))[:int(sys.argv[2])], sys.stdout)' "$2" "$1" ;;
      *) head -n "$(($1 + 1))" "$2" ;;
    esac >"$cut.part"
    mv "$cut.part" "$cut"
  fi
  printf '%s' "$cut"
}

mkdir -p "$folder"
ln -sfn "$models/minilm-l6" "$folder/minilm"
ln -sfn "$models/smollm2-135m" "$folder/smollm2"

for task in CoLA MRPC RTE SST-2; do
  name="$(printf '%s' "$task" | tr 'A-Z' 'a-z' | tr -d -)"
  for part in train dev; do
    source="$data/glue/$task/$part.tsv"
    [ -r "$source" ] || fail "$source cannot be read; see launch/tables.sh --help for what --data holds"
    if [ "$task-$part" = SST-2-train ]; then source="$(first_records "$sst2_rows" "$source")"; fi
    prepared "$name.$part" "$folder/minilm" "$source" -- --format glue --task "$task" --length 128
  done
done

prepared calibration "$folder/smollm2" "$data/wikitext-2/valid.txt" -- --format text
prepared heldout "$folder/smollm2" "$data/wikitext-2/test.txt" -- --format text
commonsense="$data/commonsense"
prepared commonsense.train "$folder/smollm2" "$commonsense"/{ARC-Easy,ARC-Challenge,boolq,openbookqa}/train.json -- \
  --format instruction
for row in arc_easy:ARC-Easy:arc arc_challenge:ARC-Challenge:arc boolq:boolq:boolq obqa:openbookqa:obqa siqa:social_i_qa:siqa; do
  IFS=: read -r name task template <<<"$row"
  source="$commonsense/$task/test.json"
  [ -r "$source" ] || fail "$source cannot be read; see launch/tables.sh --help for what --data holds"
  prepared "$name" "$folder/smollm2" "$(first_records "$questions" "$source")" -- --format choices --template "$template"
done
