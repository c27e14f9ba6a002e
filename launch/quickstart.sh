#!/usr/bin/env bash
# From a fresh machine to a pruned, retrained and compressed language model with a report.
#
#   launch/quickstart.sh [overrides...]                            the example: SmolLM2-135M
#   launch/quickstart.sh --model DIR --text FILE [overrides...]    your own checkpoint and text
#
#   --model  a checkpoint as transformers writes it: config.json, safetensors, tokenizer.json
#   --text   UTF-8; its paragraphs become the calibration, training and held-out parts
#   --ranks  MPI ranks on this machine                             (2)
#   overrides  of the configuration quickstart, e.g. prune.method=sparsegpt run.seed=1
#
# What it costs: the first time a few minutes and 7 GB for PyTorch's libraries, then at most a quarter
# of an hour on two cores, the build included. A second start skips all that is done. The variables
# it obeys are listed at the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ESPALIER_SOURCE"
asked_from="$OLDPWD"

model="" text="" ranks=2
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s' "$asked_from/$1" ;; esac }
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model="$(absolute "${2:?--model takes a checkpoint directory}")"; shift 2 ;;
    --text) text="$(absolute "${2:?--text takes a file}")"; shift 2 ;;
    --ranks) ranks="${2:?--ranks takes a number}"; shift 2 ;;
    -h | --help) sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    -*) fail "quickstart.sh: $1 is none of --model, --text, --ranks" ;;
    *) break ;;
  esac
done
for override in "$@"; do
  case "$override" in
    *=* | '~'*) ;;
    *) fail "quickstart.sh: $override is no override; overrides look like prune.method=wanda and come last" ;;
  esac
done
if [ -n "$model" ]; then
  [ -e "$model/config.json" ] || fail "--model $model has no config.json; give a checkpoint as transformers writes it"
  [ -e "$model/tokenizer.json" ] || fail "--model $model has no tokenizer.json; save its fast tokenizer there (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
fi
[ -z "$text" ] || [ -r "$text" ] || fail "--text $text cannot be read"

started=$SECONDS
if [ -n "$model" ] && [ -n "$text" ]; then launch/setup.sh --own-model; else launch/setup.sh; fi
launch/build.sh

if [ -n "$model" ] || [ -n "$text" ]; then
  # Named by what it was made from, so that another model or text never meets the old parts.
  [ -n "$model" ] || { launch/make_example.sh; model="$ESPALIER_WORK/models/smollm2-135m"; }
  name="$(basename "$model")-$({ printf '%s\n' "$model"; if [ -n "$text" ]; then cat "$text"; fi; } | sha256sum | cut -c1-8)"
  texts="$ESPALIER_WORK/own/$name/texts" data="$ESPALIER_WORK/own/$name/data"
  if [ ! -e "$texts/train.txt" ]; then
    step "text" "$ESPALIER_VENV/bin/python" launch/make_text.py "$texts" ${text:+--text "$text"}
  fi
  launch/tokenize.sh "$model" "$texts" "$data"
else
  launch/make_example.sh
  name=quickstart model="$ESPALIER_WORK/models/smollm2-135m" data="$ESPALIER_WORK/data"
fi

run_dir="$ESPALIER_SOURCE/outputs/$name"
status=0
launch/run.sh -n "$ranks" --threads 1 -- --config-name quickstart "model.path=$model" \
  "data.calibration=$data/calibration.h5" "data.train=$data/train.h5" \
  "evaluate.tasks.text.data=$data/heldout.h5" "run.dir=$run_dir" "$@" || status=$?

# An override may have moved the run; a failed run has a report too, which shows how far it came.
for override in "$@"; do
  case "$override" in run.dir=*) run_dir="${override#run.dir=}" ;; esac
done
if [ -d "$run_dir" ]; then
  "$ESPALIER_VENV/bin/python" launch/report.py "$run_dir" --table
fi
[ "$status" = 0 ] || fail "the run ended with code $status after $((SECONDS - started)) s; the same command goes on where it stopped"
say "all of it took $((SECONDS - started)) s"
