#!/usr/bin/env bash
# Submits a run to Slurm. The job asks to be told two minutes before its time is up; espalier then
# finishes its current unit, saves and exits with 75, and the job puts itself back into the queue,
# where the same command goes on from there. The bits are those of an undisturbed run.
#
#   launch/submit.sh [--nodes N] [--ranks-per-node R] [--time T] [--partition P] [--account A]
#                    [--gpus-per-node G] [--unchecked] [--] espalier's arguments...
#
# Before anything is queued, espalier --plan looks at configuration, model and data here and prints what will
# be done; --unchecked leaves that out where this machine sees no data.
#
#   launch/submit.sh --nodes 4 --config-name llama_2to4 model.path=/models/llama
#
# What a job costs: it holds `nodes` whole nodes (--exclusive) for at most --time (default 4 h), that is
# nodes x cores x hours of core time; the default run (128 sequences of 2048 tokens for pruning, the
# retraining steps of its configuration) reads every weight once a stage and sends per block one n x n
# integer sum for each distinct input (Wanda: n sums). Each save and restart costs at most one unit.
# Variables: the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nodes=1 ranks_per_node=1 time=04:00:00 checked=1 options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes) nodes="${2:?--nodes takes a number}"; shift 2 ;;
    --ranks-per-node) ranks_per_node="${2:?--ranks-per-node takes a number}"; shift 2 ;;
    --gpus-per-node)
      # One rank a GPU.
      ranks_per_node="${2:?--gpus-per-node takes a number}"
      options+=("--gpus-per-node=$2")
      shift 2
      ;;
    --time) time="${2:?--time takes a duration as sbatch does}"; shift 2 ;;
    --partition | --account | --qos | --constraint | --job-name | --output)
      options+=("$1=${2:?$1 takes a value}")
      shift 2
      ;;
    -h | --help) show_help ;;
    --unchecked) checked=0; shift ;;
    --) shift; break ;;
    *) break ;;
  esac
done
for number in "$nodes" "$ranks_per_node"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "submit.sh: $number is no number of nodes, ranks or GPUs"
done
for argument in "$@"; do
  case "$argument" in
    --nodes* | --ranks-per-node* | --gpus-per-node* | --time* | --partition* | --account* | --qos* | --constraint* | --job-name* | --output*)
      fail "submit.sh: $argument is Slurm's and comes before espalier's arguments" ;;
  esac
done
command -v sbatch >/dev/null || fail "sbatch is not here; submit from a machine of the Slurm cluster, or use launch/run.sh"
[ -x "$ESPALIER_BUILD/espalier" ] || fail "$ESPALIER_BUILD/espalier is not there; launch/setup.sh and then launch/build.sh make it"
if [ "$checked" = 1 ]; then
  "$ESPALIER_BUILD/espalier" --plan "$@" || fail "submit.sh: nothing was queued (--unchecked submits without this look)"
fi

exec sbatch --nodes="$nodes" --ntasks-per-node="$ranks_per_node" --exclusive --time="$time" --requeue \
  --open-mode=append --signal=B:USR1@120 --job-name=espalier "${options[@]}" \
  "$ESPALIER_SOURCE/launch/job.sh" "$ESPALIER_SOURCE" "$((nodes * ranks_per_node))" "$@"
