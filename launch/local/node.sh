#!/usr/bin/env bash
# This machine's part of a run: the same command on every machine, with another NODE_RANK. Run it from the
# repository's root (configs/accelerate/ds_*.yaml name their JSON from there).
#
#   NODE_RANK=0 NNODES=2 MAIN_ADDR=10.0.0.1 MAIN_PORT=29500 \
#       launch/local/node.sh configs/accelerate/ds_zero2.yaml run.yaml [--key value ...]
#
#   NNODES           machines (1)
#   NODE_RANK        which of them this is, from 0
#   MAIN_ADDR        address of machine 0, seen from all
#   MAIN_PORT        a port that is free there (29500)
#   RANKS_PER_NODE   processes on each machine (num_processes of the accelerate configuration)
#   PYTHON           the interpreter (.venv/bin/python of the repository, else python)
#
# The exit code is minimind-dpo's: 75 when the run stopped early with a checkpoint.
set -euo pipefail

die() {
    echo "node.sh: $*" >&2
    exit 2
}

[[ $# -ge 2 ]] || die "usage: node.sh ACCELERATE_CONFIG TRAIN_CONFIG [--key value ...]"
accelerate_config=$1 train_config=$2
shift 2
for file in "$accelerate_config" "$train_config"; do
    [[ -f $file ]] || die "$file: no such file (run from the repository's root)"
done

nodes=${NNODES:-1} rank=${NODE_RANK:-0}
[[ $nodes -eq 1 || -n ${NODE_RANK:-} ]] || die "NODE_RANK: set it to this machine's number, 0 to $((nodes - 1))"
[[ $nodes -eq 1 || -n ${MAIN_ADDR:-} ]] || die "MAIN_ADDR: set it to machine 0's address"
((rank < nodes)) || die "NODE_RANK is $rank, but there are $nodes machines (NNODES)"

value_of() { # KEY: a top-level value of the accelerate configuration
    sed -n "/^$1:/{s/^$1: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p;q}" "$accelerate_config"
}
ranks=${RANKS_PER_NODE:-$(value_of num_processes)}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "RANKS_PER_NODE: set it; $accelerate_config has no num_processes"
processes=$((nodes * ranks))
kind=$(value_of distributed_type)
[[ $processes -eq 1 || ${kind^^} != NO ]] ||
    die "$accelerate_config is for one process (distributed_type: NO), but $processes are asked for"

options=(--num_machines "$nodes" --machine_rank "$rank" --num_processes "$processes"
    --main_process_port "${MAIN_PORT:-29500}")
if [[ $nodes -gt 1 ]]; then options+=(--main_process_ip "$MAIN_ADDR"); fi
# DeepSpeed's own multi-node launchers start the other machines over ssh; here each machine is started already
if [[ $nodes -gt 1 && ${kind^^} == DEEPSPEED ]]; then options+=(--deepspeed_multinode_launcher standard); fi

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
fi
exec "$python" -m minimind_dpo.launch --config_file "$accelerate_config" "${options[@]}" \
    -m minimind_dpo.train --config "$train_config" "$@"
