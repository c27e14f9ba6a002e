#!/usr/bin/env bash
# Prepares a machine: system packages, a virtual environment, LibTorch. Every step is skipped when it
# is done already; nothing outside ESPALIER_VENV and ESPALIER_WORK is written but system packages.
#
#   launch/setup.sh [--own-model] [--tests] [--check]
#     --own-model  leave out what only converting the packaged model needs
#     --tests      what launch/test.sh needs as well
#     --check      change nothing; say what is there and what is missing (exit code 1 if something is)
#
# The variables it obeys are listed at the top of launch/environment.sh. Without the right to install
# system packages it names all that is missing, and what for, before it does anything else.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

check=false own_model=false tests=false
for argument in "$@"; do
  case "$argument" in
    --check) check=true ;;
    --own-model) own_model=true ;;
    --tests) tests=true ;;
    -h | --help) show_help ;;
    *) fail "setup.sh: $argument is none of --own-model, --tests, --check" ;;
  esac
done

# ------------------------------------------------------------------------------ system packages
# Debian's package | what it is for | how to see that it is there
needs() {
  cat <<'END'
g++|the C++20 compiler|compiler
cmake|the build|program cmake
ninja-build|the build|program ninja
pkg-config|lets CMake find libraries|program pkg-config
libopenmpi-dev|MPI, the ranks' communication|program mpicxx
openmpi-bin|mpirun, which starts the ranks|program mpirun
libhdf5-openmpi-dev|HDF5, data sets and artifacts|header hdf5.h
libyaml-cpp-dev|the configuration's files|header yaml-cpp/yaml.h
nlohmann-json3-dev|manifests and checkpoints' metadata|header nlohmann/json.hpp
libfmt-dev|messages|header fmt/format.h
libhwy-dev|vectorised kernels|header hwy/highway.h
libdnnl-dev|bfloat16 products on the CPU|header dnnl.hpp
libxxhash-dev|checksums|header xxhash.h
libssl-dev|the checksum of a tokenizer|header openssl/evp.h
python3-venv|the virtual environment|venv
END
  if $tests; then
    echo "libgtest-dev|the tests|header gtest/gtest.h"
  fi
}

# Makes a repeated build quick, gives the example's text, or what one test needs; work goes on without them.
wishes() {
  echo "ccache|repeated builds|program ccache"
  if $tests; then
    echo "munge|the test of launch/submit.sh|program munged"
    echo "slurm-wlm|the test of launch/submit.sh|program slurmctld"
  fi
  if ! $own_model; then
    echo "python3.11-doc|the text of the example|documentation"
  fi
}

has_header() {
  local folder
  for folder in /usr/include /usr/local/include /usr/include/hdf5/openmpi /usr/include/hdf5/serial \
    ${HDF5_ROOT:+"$HDF5_ROOT/include"} ${HDF5_DIR:+"$HDF5_DIR/include"}; do
    [ -e "$folder/$1" ] && return 0
  done
  local IFS=:
  for folder in ${CPATH:-} ${CPLUS_INCLUDE_PATH:-}; do
    [ -e "$folder/$1" ] && return 0
  done
  IFS=':;'
  for folder in ${CMAKE_PREFIX_PATH:-}; do
    [ -e "$folder/include/$1" ] && return 0
  done
  return 1
}

is_there() {
  case "$1" in
    compiler) command -v "${CXX:-g++}" >/dev/null ;;
    venv) [ -x "$ESPALIER_VENV/bin/python" ] || "$ESPALIER_PYTHON" -c 'import ensurepip, venv' 2>/dev/null ;;
    program\ *) command -v "${1#program }" >/dev/null ;;
    header\ *) has_header "${1#header }" ;;
    documentation) [ -d /usr/share/doc/python3.11/html/_sources ] || [ -d "$ESPALIER_WORK/python-docs" ] ;;
  esac
}

# missing LIST: the lines of a list whose probe finds nothing
missing() {
  local package purpose probe
  "$1" | while IFS='|' read -r package purpose probe; do
    is_there "$probe" || printf '%s|%s\n' "$package" "$purpose"
  done
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

update_package_lists() { attempt apt-get -o Acquire::Retries=3 update; }
install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  attempt apt-get -o Acquire::Retries=3 install -y --no-install-recommends "$@"
}

# Unpacked, not installed: minimal images are set to leave out /usr/share/doc.
fetch_documentation() {
  local folder
  folder="$(mktemp -d "$ESPALIER_WORK/.documentation-XXXXXX")"
  (cd "$folder" && attempt apt-get -o Acquire::Retries=3 download "$1" && dpkg-deb -x ./*.deb unpacked)
  mv "$folder/unpacked/usr/share/doc/python3.11/html/_sources" "$ESPALIER_WORK/python-docs"
  rm -rf "$folder"
}

system_packages() {
  local lacking wished package lists_are_fresh=false
  lacking="$(missing needs)" wished="$(missing wishes)"
  if $check; then
    report_missing "$lacking" "missing"
    report_missing "$wished" "missing (work goes on without it)"
    [ -n "$lacking$wished" ] || say "system packages: all there"
    [ -z "$lacking" ] || complete=false
    return
  fi
  if may_install && [ -n "$lacking" ]; then
    step "package lists" update_package_lists
    lists_are_fresh=true
    # shellcheck disable=SC2046  # one word a package
    step "system packages" install_packages $(cut -d'|' -f1 <<<"$lacking")
    lacking="$(missing needs)"
  fi
  if may_install && [ -n "$wished" ] && [ "$wished" != "$(wishes_refused)" ]; then
    $lists_are_fresh || try_step "package lists" update_package_lists
    while IFS='|' read -r package _; do
      case "$package" in
        *-doc) try_step "documentation" fetch_documentation "$package" ;;
        *) try_step "system package $package" install_packages "$package" ;;
      esac
      [ "$step_status" = 0 ] || say "no $package here; work goes on without it"
    done <<<"$wished"
    mkdir -p "$ESPALIER_WORK"
    missing wishes >"$ESPALIER_WORK/not-in-this-distribution"
  fi
  [ -z "$lacking" ] || {
    report_missing "$lacking" "missing"
    say "install them (Debian: apt-get install $(cut -d'|' -f1 <<<"$lacking" | tr '\n' ' '))"
    fail "or load the modules that hold them and set CMAKE_PREFIX_PATH to their folders, then start this again"
  } >&2
  say "system packages: there"
}

# What this distribution does not have is not asked for at every start.
wishes_refused() { cat "$ESPALIER_WORK/not-in-this-distribution" 2>/dev/null || true; }

report_missing() {
  local package purpose
  while IFS='|' read -r package purpose; do
    [ -z "$package" ] || say "$2: $package ($purpose)"
  done <<<"$1"
}

# ------------------------------------------------------------------------- virtual environment
stamp_of() { printf '%s' "$ESPALIER_VENV/.espalier-${1%.txt}"; }
hash_of() { sha256sum <"$ESPALIER_SOURCE/launch/$1"; }
is_installed() { [ "$(cat "$(stamp_of "$1")" 2>/dev/null)" = "$(hash_of "$1")" ]; }

make_environment() {
  "$ESPALIER_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$ESPALIER_PYTHON is older than 3.11; set ESPALIER_PYTHON to a newer one"; return 1; }
  rm -f "$ESPALIER_VENV"/.espalier-*
  "$ESPALIER_PYTHON" -m venv "$ESPALIER_VENV"
}

# The lists are complete, so pip resolves nothing and brings nothing that is not pinned.
install_requirements() {
  attempt "$ESPALIER_VENV/bin/python" -m pip install --no-deps --no-compile --disable-pip-version-check \
    --retries 5 -r "$ESPALIER_SOURCE/launch/$1"
  hash_of "$1" >"$(stamp_of "$1").new"
  mv "$(stamp_of "$1").new" "$(stamp_of "$1")"
}

python_packages() {
  local list
  if ! "$ESPALIER_VENV/bin/python" -c '' 2>/dev/null; then
    if $check; then
      say "missing: virtual environment $ESPALIER_VENV"
      complete=false
    else
      step "virtual environment" make_environment
    fi
  fi
  for list in "$@"; do
    if is_installed "$list"; then
      say "$list: installed"
    elif $check; then
      say "missing: the packages of launch/$list"
      complete=false
    else
      step "$list" install_requirements "$list"
    fi
  done
}

lists=(requirements.txt)
# transformers stands on PyTorch's Python side, which a person's own LibTorch may lack.
if [ -z "$ESPALIER_LIBTORCH" ] || $tests || ! $own_model; then lists+=(requirements-torch.txt); fi
if $tests || ! $own_model; then lists+=(requirements-model.txt); fi
if $tests; then lists+=(requirements-test.txt); fi

complete=true
if [ -n "$ESPALIER_LIBTORCH" ] && [ ! -e "$ESPALIER_LIBTORCH/include/ATen/ATen.h" ]; then
  fail "ESPALIER_LIBTORCH=$ESPALIER_LIBTORCH has no include/ATen/ATen.h; give the folder that holds include/ and lib/, or unset it"
fi
system_packages
python_packages "${lists[@]}"
$complete || fail "set-up is not complete; launch/setup.sh without --check completes it"
