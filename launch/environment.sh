# shellcheck shell=bash
# Sourced by every script of this folder: where things are, and how the scripts speak.
#
# Variables that a person may set:
#   ESPALIER_VENV      virtual environment of the Python periphery      (<source>/.venv)
#   ESPALIER_PYTHON    Python 3.11 or newer that makes that environment (python3)
#   ESPALIER_LIBTORCH  a LibTorch that is there already, 2.4 or newer: the folder with include/ and
#                      lib/ (also .../site-packages/torch); then none is installed
#   ESPALIER_BUILD     where to build                                   (<source>/build)
#   ESPALIER_WORK      models, texts and data sets made here            (<source>/.espalier)
#   ESPALIER_JOBS      compilers at a time                              (all cores)
#   ESPALIER_MPIRUN_ARGUMENTS  added to every mpirun, e.g. "--mca btl tcp,self", or where MPI uses UCX
#                      "-x UCX_NET_DEVICES=mlx5_0:1"
#   ESPALIER_INTERFACE network interface for MPI and NCCL, as `ip link` names it (each chooses one)
# CMake's own variables (CMAKE_PREFIX_PATH, CXX, HDF5_ROOT, ...) are honoured, so modules work.

ESPALIER_SOURCE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${ESPALIER_VENV:=$ESPALIER_SOURCE/.venv}"
: "${ESPALIER_PYTHON:=python3}"
: "${ESPALIER_LIBTORCH:=}"
: "${ESPALIER_BUILD:=$ESPALIER_SOURCE/build}"
: "${ESPALIER_WORK:=$ESPALIER_SOURCE/.espalier}"
: "${ESPALIER_JOBS:=$(nproc)}"
: "${ESPALIER_MPIRUN_ARGUMENTS:=}"
: "${ESPALIER_INTERFACE:=}"
export ESPALIER_SOURCE ESPALIER_VENV ESPALIER_LIBTORCH ESPALIER_BUILD ESPALIER_WORK ESPALIER_JOBS

# OpenMPI asks for a clear word before it runs as root, and root usually means a container, where
# reading another process's memory is not allowed either.
if [ "$(id -u)" = 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  export OMPI_MCA_btl_vader_single_copy_mechanism="${OMPI_MCA_btl_vader_single_copy_mechanism:-none}"
fi

say() { printf 'espalier: %s\n' "$*"; }
fail() {
  printf 'espalier: %s\n' "$*" >&2
  exit 1
}

# --help: the comment at the top of the script that was started.
show_help() {
  sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 0
}
asked_for_help() { case "${1:-}" in -h | --help) show_help ;; esac }

# quoted TEXT: the text as an override's value, whatever signs it holds (a directory called a=1,b=2).
quoted() { printf "'%s'" "${1//\'/\\\'}"; }

# step NAME COMMAND...: one plain line with what was done and how long it took. The command's output
# goes to a log, which is shown when it fails, and then the script ends.
step() {
  try_step "$@"
  [ "$step_status" = 0 ] && return
  tail -n 60 "$step_log" >&2
  fail "$1: failed after $step_seconds s; the whole output is in $step_log"
}

# The same for what work can go on without; step_status says how it ended. Not to be called inside a
# condition: a shell ignores -e there, in all that is called from it.
try_step() {
  local name="$1" started=$SECONDS
  shift
  mkdir -p "$ESPALIER_WORK/log"
  step_log="$ESPALIER_WORK/log/$(printf '%s' "$name" | tr -c 'A-Za-z0-9' '-' | cut -c1-150).txt"
  set +e
  (set -e; "$@") >"$step_log" 2>&1 </dev/null
  step_status=$?
  set -e
  step_seconds=$((SECONDS - started))
  if [ "$step_status" = 0 ]; then say "$name: done in $step_seconds s"; fi
}

# attempt COMMAND...: package registries have hiccups; three tries, then the failure is real.
attempt() {
  local try
  for try in 1 2 3; do
    "$@" && return 0
    [ "$try" = 3 ] || { printf 'try %s failed, the next follows in %s s\n' "$try" $((try * 10)); sleep $((try * 10)); }
  done
  return 1
}

# is_sweep ESPALIER'S ARGUMENTS...
is_sweep() { [[ " $* " =~ \ (-m|--multirun)\  ]]; }

# What tells mpirun, and by it every rank, to keep to the interface: MPI's data, its own messages, NCCL.
interface_words() {
  [ -z "$ESPALIER_INTERFACE" ] || printf '%s ' --mca btl_tcp_if_include "$ESPALIER_INTERFACE" \
    --mca oob_tcp_if_include "$ESPALIER_INTERFACE" -x "NCCL_SOCKET_IFNAME=$ESPALIER_INTERFACE"
}

# summarize_sweep ESPALIER'S ARGUMENTS...: table, summary and report page of a sweep whose members ran each in a
# start of its own. Not 0 while a member is not finished. `program` is what starts espalier.
summarize_sweep() {
  local status=0 directory
  "${program[@]}" --summary "$@" || status=$?
  "${program[@]}" --members "$@" | sed 's|/[^/]*$||' | sort -u | while IFS= read -r directory; do
    if [ -x "$ESPALIER_VENV/bin/python" ] && [ -e "$directory/summary.json" ]; then
      "$ESPALIER_VENV/bin/python" "$ESPALIER_SOURCE/launch/report.py" "$directory"
    fi
  done
  return "$status"
}

# The LibTorch to build with: the person's, or the one of the virtual environment.
libtorch_folder() {
  local folder="$ESPALIER_LIBTORCH"
  if [ -z "$folder" ]; then
    for folder in "$ESPALIER_VENV"/lib/python3.*/site-packages/torch; do :; done
  fi
  printf '%s' "$folder"
}
