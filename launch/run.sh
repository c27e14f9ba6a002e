#!/usr/bin/env bash
# Starts espalier under mpirun, on this machine or on those of a host file.
#
#   launch/run.sh [options] [--] espalier's arguments...
#
#   -n              ranks over all machines                          (1)
#   --hostfile      OpenMPI's host file, lines such as: node1 slots=2; filled one after the other
#   --threads       threads of each rank; 0: all cores it may use    (cores of this machine / ranks on one machine)
#   --interface     network interface for MPI and NCCL               (ESPALIER_INTERFACE)
#   --side-by-side  a sweep (-m): each member in a start of its own, so many at a time (1: in turn). One that fails
#                   stops no other; summary and report are written at the end, and the exit code is that of the
#                   first that failed. The same command again goes on with what is not finished
#
#   launch/run.sh -n 2 --config-name llama_2to4 model.path=/models/llama
#   launch/run.sh -n 8 --hostfile hosts.txt --threads 16 --interface eth1 --config-name llama_2to4
#   launch/run.sh --side-by-side 2 --config-name mine -m prune=wanda,sparsegpt run.seed=0,1
#
# What it costs: ranks x threads cores for as long as it takes (launch/quickstart.sh says how long the example
# does), members side by side so many times that. On several machines source, build and data lie under the same
# paths. The results are the same bits for any number of ranks and threads. Members that ran before are kept,
# and their stages taken over by others; what two compute at the same moment each computes itself. TERM and USR1
# make what is at work save and end with 75. Variables: the top of launch/environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks=1 threads="" hostfile="" side_by_side=""
while [ $# -gt 0 ]; do
  case "$1" in
    -n | --ranks) ranks="${2:?-n takes the number of ranks}"; shift 2 ;;
    --hostfile) hostfile="${2:?--hostfile takes a file}"; shift 2 ;;
    --threads) threads="${2:?--threads takes a number}"; shift 2 ;;
    --interface) export ESPALIER_INTERFACE="${2:?--interface takes the name of a network interface}"; shift 2 ;;
    --side-by-side) side_by_side="${2:?--side-by-side takes a number of members}"; shift 2 ;;
    -h | --help) show_help ;;
    --) shift; break ;;
    *) break ;;
  esac
done
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "-n $ranks is no number of ranks"
[[ "${side_by_side:-1}" =~ ^[1-9][0-9]*$ ]] || fail "--side-by-side $side_by_side is no number of members"
[ -z "$hostfile" ] || [ "${side_by_side:-1}" = 1 ] ||
  fail "members side by side share one machine; with --hostfile give --side-by-side 1, or use launch/submit.sh --array"
[ -z "$side_by_side" ] || is_sweep "$@" || fail "run.sh: --side-by-side is for a sweep: add -m"
program="$ESPALIER_BUILD/espalier"
[ -x "$program" ] || fail "$program is not there; launch/setup.sh and then launch/build.sh make it"
[ -z "$hostfile" ] || [ -r "$hostfile" ] || fail "--hostfile $hostfile cannot be read"

if [ -z "$threads" ]; then
  on_one_machine="$ranks"
  if [ -n "$hostfile" ]; then
    slots="$(sed -n 's/#.*//; s/.*[[:space:]]slots *= *\([1-9][0-9]*\).*/\1/p' "$hostfile" | sort -n | tail -n 1)"
    [ "${slots:-$ranks}" -ge "$ranks" ] || on_one_machine="$slots"
  fi
  threads=$(($(nproc) / (on_one_machine * ${side_by_side:-1})))
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
# shellcheck disable=SC2207,SC2206  # several words
arguments+=($(interface_words) $ESPALIER_MPIRUN_ARGUMENTS)
# A thread count that the person's own arguments state comes later and wins.
command=(mpirun "${arguments[@]}" "$program" "cluster.threads_per_rank=$threads")
[ -n "$side_by_side" ] || exec "${command[@]}" "$@"

# ------------------------------------------------------------------------------- a sweep, member by member
declare -A at_work=()  # a member's number by its mpirun's process
status=0 stopping=""

# stop SIGNAL CODE: nothing more is started, and this script ends with the code. mpirun hands USR1 on to its
# ranks, which save; TERM ends them.
stop() {
  stopping="$2"
  [ ${#at_work[@]} = 0 ] || kill "-$1" "${!at_work[@]}" 2>/dev/null || true
}
trap 'stop USR1 75' USR1 TERM
trap 'stop TERM 130' INT

# begin NUMBER ESPALIER'S ARGUMENTS...
begin() {
  local title="member $(($1 + 1)) of ${#members[@]}" log="${members[$1]}/log.txt"
  if [ "$side_by_side" = 1 ]; then
    say "$title: ${members[$1]}"
    "${command[@]}" --member $(($1 + 1)) "${@:2}" &
  else
    say "$title: its output goes to $log"
    mkdir -p "${members[$1]}"
    "${command[@]}" --member $(($1 + 1)) "${@:2}" >>"$log" 2>&1 &
  fi
  at_work[$!]="$1"
  # A signal that came meanwhile did not see it.
  [ -z "$stopping" ] || kill -USR1 $! 2>/dev/null || true
}

# wait_for_less_than NUMBER: until so few are at work; notes how each ended.
wait_for_less_than() {
  local process code number
  while :; do
    for process in "${!at_work[@]}"; do
      if kill -0 "$process" 2>/dev/null; then continue; fi
      code=0
      wait "$process" || code=$?
      [ -z "$stopping" ] || [ "$code" = 0 ] || code=75  # however far it was when it was told
      number="${at_work[$process]}"
      unset "at_work[$process]"
      case "$code" in
        0) say "member $((number + 1)): done" ;;
        75) stopping="${stopping:-75}" ;;  # saved
        *)
          say "member $((number + 1)) failed with code $code: ${members[$number]}" >&2
          [ "$status" != 0 ] || status="$code"
          ;;
      esac
    done
    [ ${#at_work[@]} -ge "$1" ] || return 0
    sleep 0.2 || true  # a signal may end it
  done
}

"$program" --plan "$@" >/dev/null  # every member is checked before the first begins
names="$("$program" --members "$@")"
mapfile -t members <<<"$names"
for number in "${!members[@]}"; do
  wait_for_less_than "$side_by_side"
  [ -z "$stopping" ] || break
  begin "$number" "$@"
done
wait_for_less_than 1
[ -z "$stopping" ] || exit "$stopping"
summarize_sweep "$@" || status=$((status > 0 ? status : $?))
exit "$status"
