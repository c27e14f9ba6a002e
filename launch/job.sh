#!/usr/bin/env bash
# The batch script that launch/submit.sh hands to Slurm:  job.sh SOURCE RANKS espalier's arguments...
#
# USR1 (two minutes before the time limit) and TERM reach this script alone. It hands them on, the ranks
# of every node save and exit with 75, and the job is requeued.
# Slurm runs a copy of this file, hence the first argument.
set -uo pipefail
if [ $# -lt 2 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "espalier: job.sh is started by Slurm; launch/submit.sh --help says how to submit a run" >&2
  exit 2
fi
source_folder="$1" ranks="$2"
shift 2
# shellcheck source=launch/environment.sh
. "$source_folder/launch/environment.sh"
# The number of cores a rank may use: nothing else runs on these nodes.
threads=$((SLURM_CPUS_ON_NODE / (ranks / SLURM_JOB_NUM_NODES)))
[ "$threads" -ge 1 ] || threads=1
# A requeued job goes on: run.resume=false was meant for its first start.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  arguments=()
  for argument in "$@"; do
    [ "$argument" = run.resume=false ] || arguments+=("$argument")
  done
  set -- "${arguments[@]}"
fi
# shellcheck disable=SC2086  # several words
mpirun -n "$ranks" --map-by "ppr:$((ranks / SLURM_JOB_NUM_NODES)):node" --bind-to none --oversubscribe \
  $ESPALIER_MPIRUN_ARGUMENTS "$ESPALIER_BUILD/espalier" "cluster.threads_per_rank=$threads" "$@" &
ranks_process=$!
# mpirun forwards USR1 to every rank; at TERM it would end them all instead.
trap 'kill -USR1 "$ranks_process"' USR1 TERM
# A trapped signal ends wait early; the ranks are still saving then.
while kill -0 "$ranks_process" 2>/dev/null; do
  wait "$ranks_process"
done
wait "$ranks_process"
code=$?
if [ "$code" = 75 ]; then
  echo "espalier: saved; the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  # Slurm ends this script; leaving earlier would report the job as failed.
  sleep 60
fi
exit "$code"
