#!/usr/bin/env bash
# Starts espalier under mpirun, on this machine or on those of a host file.
#
#   launch/run.sh [-n RANKS] [--hostfile FILE] [--threads N] [--] espalier's arguments...
#
#   -n          ranks over all machines                          (1)
#   --hostfile  OpenMPI's host file, lines such as: node1 slots=2
#   --threads   threads of each rank; 0: all cores it may use    (cores of this machine / its ranks)
#
#   launch/run.sh -n 2 --config-name llama_2to4 model.path=/models/llama
#   launch/run.sh -n 8 --hostfile hosts.txt --threads 16 --config-name llama_2to4
#
# On several machines source, build and data lie under the same paths. The results are the same bits
# for any number of ranks and threads. Variables: the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks=1 threads="" hostfile=""
while [ $# -gt 0 ]; do
  case "$1" in
    -n | --ranks) ranks="${2:?-n takes the number of ranks}"; shift 2 ;;
    --hostfile) hostfile="${2:?--hostfile takes a file}"; shift 2 ;;
    --threads) threads="${2:?--threads takes a number}"; shift 2 ;;
    -h | --help) show_help ;;
    --) shift; break ;;
    *) break ;;
  esac
done
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "-n $ranks is no number of ranks"
program="$ESPALIER_BUILD/espalier"
[ -x "$program" ] || fail "$program is not there; launch/setup.sh and then launch/build.sh make it"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || fail "--hostfile $hostfile cannot be read"
if [ -z "$threads" ] && [ -z "$hostfile" ]; then
  threads=$(($(nproc) / ranks))
  [ "$threads" -ge 1 ] || threads=1
fi

# Without --bind-to none a rank and all its threads would share one core.
arguments=(-n "$ranks" --bind-to none)
if [ -n "$hostfile" ]; then
  arguments+=(--hostfile "$hostfile")
  # Each variable that matters there is sent along; mpirun forwards only its own.
  for name in OMPI_MCA_btl_vader_single_copy_mechanism LD_LIBRARY_PATH PATH; do
    [ -z "${!name:-}" ] || arguments+=(-x "$name")
  done
elif [ "$ranks" -gt "$(nproc)" ]; then
  arguments+=(--oversubscribe)
fi
# shellcheck disable=SC2206  # several words
arguments+=($ESPALIER_MPIRUN_ARGUMENTS)
# A thread count that the person's own arguments state comes later and wins.
exec mpirun "${arguments[@]}" "$program" ${threads:+"cluster.threads_per_rank=$threads"} "$@"
