#!/usr/bin/env bash
# The batch script that launch/submit.sh hands to Slurm:  job.sh SOURCE KIND RANKS espalier's arguments...
#
#   KIND  run; first or next of a chain; member of a sweep (a task of an array), summary of its members
#
# USR1 (--notice seconds before the time limit) and TERM reach this script alone. It hands them on, the ranks
# of every node save and exit with 75, and the job is requeued; in a chain the next one goes on.
# What it costs: launch/submit.sh. Slurm runs a copy of this file, hence the first argument.
set -uo pipefail
if [ $# -lt 3 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "espalier: job.sh is started by Slurm; launch/submit.sh --help says how to submit a run" >&2
  exit 2
fi
source_folder="$1" kind="$2" ranks="$3"
shift 3

# Modules that the build was made with, where submit.sh's environment does not have them loaded:
#   module load gcc/12 openmpi/4.1 hdf5/1.12-mpi

# shellcheck source=launch/environment.sh
. "$source_folder/launch/environment.sh"
program=("$ESPALIER_BUILD/espalier")

# A container: mpirun stays outside and starts it on every node; its MPI has the version of the one outside, and
# source, build, data and runs lie under the same paths in it. submit.sh itself starts the program outside, for its
# look before (--unchecked leaves that out) and for the number of an array's members.
#   program=(apptainer exec --bind /data "$HOME/espalier.sif" "$ESPALIER_BUILD/espalier")

if [ "$kind" = summary ]; then
  summarize_sweep "$@"
  exit
fi
ranks_per_node=$((ranks / SLURM_JOB_NUM_NODES))
# The number of cores a rank may use: nothing else runs on these nodes.
threads=$((SLURM_CPUS_ON_NODE / ranks_per_node))
[ "$threads" -ge 1 ] || threads=1
# A job that goes on: run.resume=false was meant for the first start.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || [ "$kind" = next ]; then
  set -- "$@" ++run.resume=true
fi
job="$SLURM_JOB_ID"
if [ "$kind" = member ]; then
  # The array's number alone would mean all of its tasks.
  job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  set -- --member "$SLURM_ARRAY_TASK_ID" "$@"
fi

ranks_process="" told=""
# mpirun forwards USR1 to every rank; at TERM it would end them all instead.
trap 'told=1; [ -z "$ranks_process" ] || kill -USR1 "$ranks_process"' USR1 TERM
# shellcheck disable=SC2046,SC2086  # several words
mpirun -n "$ranks" --map-by "ppr:$ranks_per_node:node" --bind-to none --oversubscribe $(interface_words) \
  $ESPALIER_MPIRUN_ARGUMENTS "${program[@]}" "cluster.threads_per_rank=$threads" "$@" &
ranks_process=$!
# A trapped signal ends wait early; the ranks are still saving then.
while kill -0 "$ranks_process" 2>/dev/null; do
  wait "$ranks_process"
done
wait "$ranks_process"
code=$?
trap - USR1 TERM
# Ranks that are only starting do not hear the signal yet, it ends them; they had begun nothing.
[ "$code" != $((128 + 10)) ] || [ -z "$told" ] || code=75
if [ "$code" = 75 ]; then
  case "$kind" in
    first | next) echo "espalier: saved; the chain's next job, or the same command, goes on" ;;
    *)
      echo "espalier: saved; the job goes back into the queue"
      # Slurm ends this script; leaving earlier would report the job as failed.
      scontrol requeue "$job" && sleep 60
      ;;
  esac
fi
exit "$code"
