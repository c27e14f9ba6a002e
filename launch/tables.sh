#!/usr/bin/env bash
# The tables of five publications at the scale of one machine; their results stand in configs/README.md.
#
#   launch/tables.sh TABLE... [--data FOLDER] [--ranks N] [--list] [overrides...]
#
#   TABLE      dsee, lora_xs, ether, ere, spp, or all
#   --data     a folder with glue/{CoLA,MRPC,RTE,SST-2}/{train,dev}.tsv, wikitext-2/{valid,test}.txt and
#              commonsense/{ARC-Easy,ARC-Challenge,boolq,openbookqa,social_i_qa}/{train,test}.json
#              (ESPALIER_TEST_DATA)
#   --ranks    MPI ranks of one thread each                         (2)
#   --list     prints the sweeps as command lines and does nothing
#   overrides  of every sweep: task=sst2 run.seed=0 runs that part of a table, retrain.steps=2 a trial of it. A
#              sweep that has the key with other values alone is left out
#
# A table is a named configuration and the sweeps listed here. The members lie in outputs/table_*-sweep; those
# that tables share are run once. The same command goes on where it stopped; a sweep that fails does not stop
# those behind it. launch/table_rows.py prints a table's rows. Needs launch/setup.sh --tests and launch/build.sh. What it costs: configs/README.md.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
scripts="$ESPALIER_SOURCE/launch"

# ------------------------------------------------------------------------------- the sweeps
TABLES=(dsee lora_xs ether ere spp)

# GLUE's tables have one configuration and one sweep directory, as they share cells.
glue() { sweep table_glue "$@"; }
seeds="run.seed=0,1,2"   # where an ordering is at stake

dsee_table() {
  local cell="task=sst2 cell=dsee" one="run.seed=0"
  glue task=sst2,cola,mrpc,rte run.seed=0 cell=full,top,lora,bitfit,dsee
  glue task=sst2 $seeds cell=full,lora,dsee
  glue $cell $one discover.cardinality=8,256
  glue $cell $seeds discover.cardinality=64
  glue $cell $seeds discover.cardinality=64 discover=magnitude,random
  # With and without S at equal numbers: 768 positions count as one rank of a matrix of 384 x 384.
  glue $cell $seeds retrain.adapter_rank=2 retrain.alpha=4.0 retrain.index_sets=none
  glue $cell $seeds retrain.adapter_rank=1 retrain.alpha=2.0 discover.cardinality=768
  # Targets at equal numbers; query and value are the cell's own.
  glue $cell $one retrain.adapter_rank=32 retrain.alpha=64.0 'retrain.targets=[query],[key],[value]'
  glue $cell $one 'retrain.targets=[query,key],[key,value]'
  glue $cell $one retrain.adapter_rank=8 retrain.alpha=16.0 'retrain.targets=[query,key,value,"*attention.output.dense"]'
  # Masks and heads, and the criteria at the strongest of each.
  glue task=sst2 $one cell=dsee_masks prune.sparsity=0.2,0.3
  glue task=sst2 $seeds cell=dsee_masks prune.sparsity=0.5
  glue task=sst2 $seeds cell=dsee_masks prune.sparsity=0.5 prune.criterion=merged,magnitude,random
  glue task=sst2 $one cell=dsee_heads prune.heads=3,6
  glue task=sst2 $seeds cell=dsee_heads prune.heads=9
  glue task=sst2 $seeds cell=dsee_heads prune.heads=9 prune.criterion=merged,magnitude,random
}

lora_xs_table() {
  local smallest="cell=lora_xs retrain.adapter_rank=4"
  glue task=sst2 $seeds cell=full,lora,vera
  glue task=cola run.seed=0 cell=full,lora,vera
  glue task=sst2 run.seed=0 cell=lora_xs retrain.adapter_rank=8,12,16,20
  glue task=sst2 $seeds cell=lora_xs retrain.adapter_rank=4,25
  glue task=cola run.seed=0 cell=lora_xs retrain.adapter_rank=4,16,25
  glue task=sst2 $seeds $smallest retrain.init=svd_random,random
  glue task=sst2 $seeds $smallest retrain.subspace=middle,bottom
  glue task=sst2 $seeds $smallest retrain.subspace=top,middle,bottom retrain.sigma=false
}

ether_table() {
  local methods="cell=ether,ether_plus,lora_all,oft,naive"
  glue task=sst2 run.seed=0 $methods retrain.learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2,1e-1
  glue task=sst2 $seeds cell=ether,ether_plus,lora_all retrain.learning_rate=1e-3,1e-2
  glue task=sst2 run.seed=0 cell=ether,ether_plus retrain.blocks=1,32
  glue task=sst2 run.seed=0 cell=ether retrain.side=output,both
  glue task=sst2 run.seed=0 cell=ether_plus retrain.side=input,output
}

ere_table() {
  local tasks="task=sst2,cola,mrpc,rte run.seed=0"
  glue $tasks cell=ere compress.rank=4,16,64 compress.bits=1,2,4,8
  glue $tasks cell=ere compress=low_rank compress.rank=4,16,64
  glue $tasks cell=ere compress=quantization compress.rank=null compress.bits=1,2,4,8
  glue $tasks cell=ere compress.rank=null compress.budget=0.01,0.03 compress.allocation=uniform,paper,greedy
  sweep table_ere compress.rank=1,4,16,64
}

spp_table() {
  local wanda="prune=wanda prune.sparsity=0.75"
  sweep table_spp prune=wanda,sparsegpt prune.pattern=unstructured,2:4,2:8
  sweep table_spp prune=wanda,sparsegpt prune.sparsity=0.75
  # Beside it at 75 %: DSnoT, which trains nothing, and LoRA inside and outside the mask.
  sweep table_spp prune=wanda,sparsegpt prune.sparsity=0.75 prune.refine=dsnot 'pipeline=[prune,evaluate]'
  sweep table_spp $wanda retrain=lora_star,lora_masked retrain.learning_rate=5e-4
  sweep table_spp_ablation $wanda retrain.row_groups=4,8,32
  sweep table_spp_ablation $wanda retrain.beta=false
  sweep table_spp_ablation $wanda retrain.residual=false
  sweep table_spp_ablation $wanda retrain.init=random
}

# ------------------------------------------------------------------------------- the command line
tables=() data="${ESPALIER_TEST_DATA:-}" ranks=2 list=0 overrides=()
while [ $# -gt 0 ]; do
  case "$1" in
    --data) data="${2:?--data takes a folder}"; shift 2 ;;
    --ranks) ranks="${2:?--ranks takes a number}"; shift 2 ;;
    --list) list=1; shift ;;
    -h | --help) show_help ;;
    all) tables=("${TABLES[@]}"); shift ;;
    *=*) overrides+=("$1"); shift ;;
    *)
      [[ " ${TABLES[*]} " == *" $1 "* ]] || fail "tables.sh: $1 is none of ${TABLES[*]}, all, --data, --ranks, --list, and no override"
      tables+=("$1")
      shift
      ;;
  esac
done
[ ${#tables[@]} -gt 0 ] || fail "tables.sh takes a table: ${TABLES[*]}, or all"

# Members whose figures left the finite range: each ends a start, and the next start passes over it.
diverged() {
  { find outputs -path '*-sweep/*/failure.json' -exec grep -l '"numerical": true' {} + 2>/dev/null || true; } | wc -l
}

# left_out NAME WORD...: whether the person's overrides ask for nothing of this sweep: none of the values that it
# has for a key, or a task of GLUE where it is SmolLM2's.
left_out() {
  local name="$1" override key word value found
  shift
  for override in "${overrides[@]}"; do
    key="${override%%=*}"
    if [ "$key" = task ] && [ "$name" != table_glue ]; then return 0; fi
    for word in "$@"; do
      [ "${word%%=*}" = "$key" ] || continue
      found=0
      for value in $(tr , ' ' <<<"${override#*=}"); do
        [[ ",${word#*=}," != *",$value,"* ]] || found=1
      done
      [ "$found" = 1 ] || return 0
    done
  done
  return 1
}

failed=() swept=0
sweep() {
  local name="$1" arguments title before
  shift
  if left_out "$name" "$@"; then return; fi
  swept=$((swept + 1))
  arguments=(--config-name "$name" -m "$@" "${overrides[@]}")
  if [ "$list" = 1 ]; then
    printf '%s\n' "${arguments[*]@Q}"
    return
  fi
  title="$table: $* ${overrides[*]}"
  while :; do
    before=$(diverged)
    try_step "$title" "$scripts/run.sh" -n "$ranks" --threads 1 -- "${arguments[@]}"
    if [ "$step_status" = 0 ]; then return; fi
    [ "$(diverged)" -gt "$before" ] || break
  done
  if grep 'the sweep is done but for' -A 99 "$step_log"; then return; fi
  tail -n 60 "$step_log" >&2
  failed+=("$title (the whole output is in $step_log)")
}

if [ "$list" = 0 ]; then
  [ -n "$data" ] || fail "tables.sh: --data FOLDER (or ESPALIER_TEST_DATA) is not given; see --help"
  "$scripts/make_example.sh" --tests
  "$scripts/table_data.sh" "$ESPALIER_WORK/models" "$data" "$ESPALIER_WORK/tables"
  export ESPALIER_TABLES="$ESPALIER_WORK/tables"
  cd "$ESPALIER_SOURCE"  # a sweep's directories are relative to it
fi
for table in "${tables[@]}"; do "${table}_table"; done
[ "$swept" -gt 0 ] || fail "tables.sh: no sweep of ${tables[*]} has ${overrides[*]}; without overrides --list prints them all"
[ ${#failed[@]} = 0 ] || fail "tables.sh: these failed: $(printf '\n  %s' "${failed[@]}")"
