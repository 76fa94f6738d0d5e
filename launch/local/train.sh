#!/usr/bin/env bash
# A run on this one machine that goes on after it was stopped early: when it ends with 75 (a checkpoint is written) and
# nobody asked this script to end, the same command runs again. Run it from the repository's root.
#
#   launch/local/train.sh configs/accelerate/ds_zero2_cpu.yaml run.yaml [--key value ...]
#
#   MAX_RESTARTS     how often it may run again (10)
#   RANKS_PER_NODE, MAIN_PORT, PYTHON   as in node.sh beside this file
#
# SIGTERM or Ctrl-C stops the run: it ends its optimizer step and writes a checkpoint, and this script ends with its
# exit code, 75. Any other exit code of the run ends this script too.
set -euo pipefail

node=$(dirname "${BASH_SOURCE[0]}")/node.sh
run="" stopped=""
stop() {
    stopped=yes
    [[ -z $run ]] || kill -TERM "$run" 2>/dev/null || true
}
trap stop TERM INT HUP

unset NNODES NODE_RANK MAIN_ADDR
for ((restarts = 0; ; restarts++)); do
    "$node" "$@" &
    run=$!
    # a signal interrupts `wait`, not the run
    while :; do
        before=$stopped code=0
        wait "$run" || code=$?
        [[ $code -gt 128 && $stopped != "$before" ]] || break
    done
    run=""
    [[ $code -eq 75 && -z $stopped && $restarts -lt ${MAX_RESTARTS:-10} ]] || exit "$code"
    echo "train.sh: the run stopped early with a checkpoint; run again ($((restarts + 1)) of ${MAX_RESTARTS:-10})" >&2
done
