#!/usr/bin/env bash
# Submits a run or a sweep to Slurm. A job asks to be told two minutes before its time is up; espalier then
# finishes its current unit, saves and exits with 75, and the job puts itself back into the queue,
# where the same command goes on from there. The bits are those of an undisturbed run.
#
#   launch/submit.sh [options] [--] espalier's arguments...
#
#   --nodes N            whole nodes                                    (1)
#   --ranks-per-node R   MPI ranks on each                              (1)
#   --gpus-per-node G    GPUs on each, and as many ranks, with cluster.device=cuda (this version refuses it)
#   --threads T          of each rank                                   (cores of a node / its ranks)
#   --interface NAME     network interface for MPI and NCCL             (ESPALIER_INTERFACE)
#   --time LIMIT         as sbatch takes it                             (04:00:00)
#   --notice SECONDS     before the limit, to save in                   (120)
#   --chain N            N jobs, each behind the one before, and none is requeued: where that is forbidden, or to
#                        bound the cost. Jobs behind the run's end find everything done and end at once
#   --array              a sweep (-m): a task of an array for each member, and behind them a job that writes
#                        summary and report. A member that fails stops no other; the last job then fails too.
#                        The same command again goes on with what is not finished
#   --side-by-side S     at most S members of the array at a time       (all)
#   --partition, --account, --qos, --constraint, --job-name, --output   as sbatch takes them
#   --sbatch WORD        any other option of sbatch's, e.g. --sbatch --mem=64G
#   --unchecked          queue without espalier --plan, which looks at configuration, model and data here and
#                        prints what will be done: where this machine sees no data
#
#   launch/submit.sh --nodes 4 --config-name llama_2to4 model.path=/models/llama
#   launch/submit.sh --nodes 2 --array --side-by-side 4 --config-name mine -m prune=wanda,sparsegpt run.seed=0,1
#
# What a job costs: it holds `nodes` whole nodes (--exclusive) for at most --time at a start, that is
# nodes x cores x hours of core time; a chain at most N times that, an array the same for each member. The
# default run (128 sequences of 2048 tokens for pruning, the retraining steps of its configuration) reads every
# weight once a stage and sends per block one n x n integer sum for each distinct input (Wanda: n sums). Each
# save and restart costs at most one unit.
# Modules and containers: launch/job.sh. Variables: the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nodes=1 ranks_per_node=1 threads="" time=04:00:00 notice=120 chain="" array="" side_by_side="" checked=1
device=() placement=() options=(--job-name=espalier)
while [ $# -gt 0 ]; do
  case "$1" in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
  esac
  case "$1" in
    --array | --unchecked | --help | --) ;;
    --*) [ $# -gt 1 ] || fail "submit.sh: $1 takes a value; see launch/submit.sh --help" ;;
  esac
  case "$1" in
    --nodes) nodes="$2"; shift 2 ;;
    --ranks-per-node) ranks_per_node="$2"; shift 2 ;;
    --gpus-per-node)
      # One rank a GPU.
      ranks_per_node="$2" device=(cluster.device=cuda)
      placement+=("--gpus-per-node=$2")
      shift 2
      ;;
    --threads) threads="$2"; shift 2 ;;
    --interface) export ESPALIER_INTERFACE="$2"; shift 2 ;;
    --time) time="$2"; shift 2 ;;
    --notice) notice="$2"; shift 2 ;;
    --chain) chain="$2"; shift 2 ;;
    --array) array=1; shift ;;
    --side-by-side) side_by_side="$2"; shift 2 ;;
    --partition | --account | --qos | --constraint | --job-name | --output)
      options+=("$1=$2")
      shift 2
      ;;
    --sbatch) options+=("$2"); shift 2 ;;
    -h | --help) show_help ;;
    --unchecked) checked=0; shift ;;
    --) shift; break ;;
    *) break ;;
  esac
done
for number in "--nodes $nodes" "--ranks-per-node or --gpus-per-node $ranks_per_node" "--threads ${threads:-1}" "--notice $notice" \
  "--chain ${chain:-1}" "--side-by-side ${side_by_side:-1}"; do
  [[ "$number" =~ \ [1-9][0-9]*$ ]] || fail "submit.sh: $number: a whole number of 1 or more is expected"
done
own='^--(nodes|ranks-per-node|gpus-per-node|threads|interface|time|notice|chain|array|side-by-side|partition|account|qos|constraint|job-name|output|unchecked)(=|$)'
for argument in "$@"; do
  [[ ! "$argument" =~ $own ]] || fail "submit.sh: $argument is of the job and comes before espalier's arguments"
done
[ -z "$chain" ] || [ -z "$array" ] || fail "submit.sh: --chain and --array exclude each other; tasks of an array are requeued"
[ -z "$side_by_side" ] || [ -n "$array" ] || fail "submit.sh: --side-by-side belongs to --array"
[ -z "$array" ] || is_sweep "$@" || fail "submit.sh: --array is for a sweep: add -m"
command -v sbatch >/dev/null || fail "sbatch is not here; submit from a machine of the Slurm cluster, or use launch/run.sh"
[ -x "$ESPALIER_BUILD/espalier" ] || fail "$ESPALIER_BUILD/espalier is not there; launch/setup.sh and then launch/build.sh make it"
# A thread count that the person's own arguments state comes later and wins.
set -- ${threads:+"cluster.threads_per_rank=$threads"} "${device[@]}" "$@"
if [ "$checked" = 1 ]; then
  "$ESPALIER_BUILD/espalier" --plan "$@" || fail "submit.sh: nothing was queued (--unchecked submits without this look)"
fi

# queue SBATCH'S WORDS...: the number of the job
queue() {
  local answer
  answer="$(sbatch --parsable "${options[@]}" "$@")" || return 1
  printf '%s' "${answer%%;*}"
}

placement+=(--nodes="$nodes" --ntasks-per-node="$ranks_per_node" ${threads:+"--cpus-per-task=$threads"} --exclusive
  --time="$time" --open-mode=append --signal="B:USR1@$notice")
job=("$ESPALIER_SOURCE/launch/job.sh" "$ESPALIER_SOURCE")
ranks=$((nodes * ranks_per_node))
if [ -n "$array" ]; then
  members="$("$ESPALIER_BUILD/espalier" --members "$@" | wc -l)"
  first="$(queue "${placement[@]}" --requeue --array="1-$members${side_by_side:+%$side_by_side}" "${job[@]}" member "$ranks" "$@")"
  say "job $first: $members tasks, one for each member of the sweep"
  last="$(queue --nodes=1 --ntasks=1 --time=10 --dependency="afterany:$first" "${job[@]}" summary 1 "$@")"
  say "job $last behind it writes summary and report"
elif [ -n "$chain" ]; then
  number="$(queue "${placement[@]}" --no-requeue "${job[@]}" first "$ranks" "$@")"
  say "job $number"
  for ((link = 2; link <= chain; link++)); do
    number="$(queue "${placement[@]}" --no-requeue --dependency="afterany:$number" "${job[@]}" next "$ranks" "$@")"
    say "job $number behind it"
  done
else
  number="$(queue "${placement[@]}" --requeue "${job[@]}" run "$ranks" "$@")"
  say "job $number"
fi
say "their output: slurm-*.out here, unless --output says otherwise; how far they are: build/espalier status RUN_DIR"
