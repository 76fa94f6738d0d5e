#!/usr/bin/env bash
# One node's task of a job: srun starts it once on each node, so SLURM_NODEID is this node's own. Not for direct use;
# job.sh beside this file sets the variables and reads what is left in STATE_DIR/node-N: `running`, or the exit code.
set -euo pipefail

# SLURM sends the signal before the time limit to every process of the step. The workers take it; an ignored signal is
# inherited, so the launcher, which has nothing to do with it, survives it.
trap '' USR1

note() {
    echo "$1" >"$STATE_DIR/.node-$SLURM_NODEID"
    mv "$STATE_DIR/.node-$SLURM_NODEID" "$STATE_DIR/node-$SLURM_NODEID"
}

terminated="" run=""
# shellcheck disable=SC2317  # called by the trap
terminate() {
    terminated=yes
    note terminated
    [[ -z $run ]] || kill -TERM "$run" 2>/dev/null || true
}
trap terminate TERM
note running

if [[ -n ${WANDB_API_KEY_FILE:-} ]]; then
    WANDB_API_KEY=$(<"$WANDB_API_KEY_FILE")
    export WANDB_API_KEY
fi
export NODE_RANK=$SLURM_NODEID
bash launch/local/node.sh "$@" &
run=$!
while :; do
    before=$terminated code=0
    wait "$run" || code=$?
    [[ $code -gt 128 && $terminated != "$before" ]] || break # a signal interrupts `wait`, not the run
done
note "$code"
# stopped early with a checkpoint: no bad exit, on which srun would kill nodes that are still leaving
[[ $code -ne 75 ]] || exit 0
exit "$code"
