#!/usr/bin/env bash
# From a fresh machine to a pruned, retrained and compressed language model with a report.
#
#   launch/quickstart.sh [overrides...]                            the example: SmolLM2-135M
#   launch/quickstart.sh --model DIR --text FILE [overrides...]    your own checkpoint and text
#
#   --model  a checkpoint as transformers writes it: config.json, safetensors, tokenizer.json
#   --text   UTF-8; its paragraphs become the calibration, training and held-out parts
#   --ranks  MPI ranks on this machine                             (2)
#   overrides  of the configuration quickstart, e.g. prune=sparsegpt run.seed=1
#
# What it costs: the first time a few minutes and 7 GB for PyTorch's libraries, then at most a quarter
# of an hour on two cores, the build included. A second start skips all that is done. The variables
# it obeys are listed at the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
scripts="$ESPALIER_SOURCE/launch"

model="" text="" ranks=2
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model="$(realpath -m -- "${2:?--model takes a checkpoint directory}")"; shift 2 ;;
    --text) text="$(realpath -m -- "${2:?--text takes a file}")"; shift 2 ;;
    --ranks) ranks="${2:?--ranks takes a number}"; shift 2 ;;
    -h | --help) show_help ;;
    -*) fail "quickstart.sh: $1 is none of --model, --text, --ranks" ;;
    *) break ;;
  esac
done
for override in "$@"; do
  case "$override" in
    *=* | '~'*) ;;
    *) fail "quickstart.sh: $override is no override; overrides look like prune=wanda and come last" ;;
  esac
done
if [ -n "$model" ]; then
  [ -e "$model/config.json" ] || fail "--model $model has no config.json; give a checkpoint as transformers writes it"
  [ -e "$model/tokenizer.json" ] || fail "--model $model has no tokenizer.json; save its fast tokenizer there (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
fi
[ -z "$text" ] || [ -r "$text" ] || fail "--text $text cannot be read"

started=$SECONDS
if [ -n "$model" ] && [ -n "$text" ]; then "$scripts/setup.sh" --own-model; else "$scripts/setup.sh"; fi
"$scripts/build.sh"

if [ -n "$model" ] || [ -n "$text" ]; then
  # Named by what it was made from, so that another model or text never meets the old parts.
  [ -n "$model" ] || { "$scripts/make_example.sh"; model="$ESPALIER_WORK/models/smollm2-135m"; }
  name="$(basename "$model")-$({ printf '%s\n' "$model"; if [ -n "$text" ]; then cat "$text"; fi; } | sha256sum | cut -c1-8)"
  texts="$ESPALIER_WORK/own/$name/texts" data="$ESPALIER_WORK/own/$name/data"
  if [ ! -e "$texts/train.txt" ]; then
    step "text" "$ESPALIER_VENV/bin/python" "$scripts/make_text.py" "$texts" --sources "$ESPALIER_WORK/python-docs" ${text:+--text "$text"}
  fi
  "$scripts/tokenize.sh" "$model" "$texts" "$data"
else
  "$scripts/make_example.sh"
  name=quickstart model="$ESPALIER_WORK/models/smollm2-135m" data="$ESPALIER_WORK/data"
fi

# Each set of overrides is a run of its own: one directory holds one configuration.
run_dir="$ESPALIER_SOURCE/outputs/$name"
settings=""
for override in "$@"; do
  # What changes no result belongs to the same run.
  case "$override" in run.resume=* | run.dir=* | cluster.*) ;; *) settings+=",$override" ;; esac
done
if [ -n "$settings" ]; then
  settings="$(printf '%s' "${settings#,}" | tr '/ ' '__')"
  [ ${#settings} -le 100 ] || settings="$(printf '%s' "$settings" | sha256sum | cut -c1-16)"
  run_dir+="-$settings"
fi
for override in "$@"; do
  case "$override" in run.dir=*) run_dir="${override#run.dir=}" ;; esac
done
# Quiet, as mpirun's own words would hide the program's message; what a code means is said below.
export ESPALIER_MPIRUN_ARGUMENTS="-q $ESPALIER_MPIRUN_ARGUMENTS"
status=0
"$scripts/run.sh" -n "$ranks" --threads 1 -- --config-name quickstart "model.path=$(quoted "$model")" \
  "data.calibration=$(quoted "$data/calibration.h5")" "data.train=$(quoted "$data/train.h5")" \
  "evaluate.tasks.text.data=$(quoted "$data/heldout.h5")" "run.dir=$(quoted "$run_dir")" "$@" || status=$?

# A failed run has a report too, which shows how far it came.
if [ -d "$run_dir" ]; then
  "$ESPALIER_VENV/bin/python" "$scripts/report.py" "$run_dir" --table || [ "$status" != 0 ]
fi
advice="the same command goes on where it stopped"
case "$status" in
  2) advice="mend what the message names, then start it again" ;;
  3) advice="mend what the message names of this machine; then $advice" ;;
  4) advice="this is a defect of espalier; please report it with the message" ;;
  75) advice="its state is saved; $advice" ;;
  129 | 1[3-9]?) advice="a rank was ended by signal $((status - 128)) (9: often for want of memory); $advice" ;;
esac
[ "$status" = 0 ] || fail "the run ended with code $status after $((SECONDS - started)) s: $advice"
say "all of it took $((SECONDS - started)) s"
