# What the job scripts of this directory share; they source it. It runs launch/slurm/node.sh on every node and decides
# what the end means: done, failed, or to be queued again.
# shellcheck shell=bash
set -euo pipefail

die() {
    echo "$SLURM_JOB_NAME: error: $*" >&2
    exit 2
}

# run_job DEFAULT_MAX_RESTARTS ACCELERATE_CONFIG TRAIN_CONFIG [--key value ...]
run_job() {
    local max_restarts=${MAX_RESTARTS:-$1} restarts=${SLURM_RESTART_COUNT:-0} code=0 options=()
    shift
    [[ $# -ge 2 ]] || die "usage: sbatch launch/slurm/train.sbatch ACCELERATE_CONFIG TRAIN_CONFIG [--key value ...]"
    for file in "$1" "$2"; do [[ -f $file ]] || die "$file: no such file in $PWD"; done
    # SLURM itself does not count how often it queues a job again after a node failure
    ((restarts <= max_restarts)) || { echo "restart $restarts is beyond MAX_RESTARTS=$max_restarts" && exit 75; }

    trap '' USR1 # for the workers; srun inherits that
    export NNODES=$SLURM_JOB_NUM_NODES
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MAIN_ADDR=${MAIN_ADDR:-${hosts%%$'\n'*}}
    # below the range from which systems take ports for outgoing connections; another one at each restart, so that a
    # job meets nothing of its former self
    MAIN_PORT=${MAIN_PORT:-$(free_port $((SLURM_JOB_ID * 16 + restarts)))}
    local run_dir=${LOG_DIR:-runs/slurm}/$SLURM_JOB_NAME-$SLURM_JOB_ID
    export MAIN_ADDR MAIN_PORT STATE_DIR=$run_dir/start-$restarts
    rm -rf "$STATE_DIR"
    mkdir -p "$STATE_DIR"

    # srun does not take this over from sbatch by itself since 22.05
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    if [[ -n ${CONTAINER_ARGS:-} ]]; then
        local container
        read -r -a container <<<"$CONTAINER_ARGS"
        options+=("${container[@]}")
    elif [[ -f .venv/bin/activate ]]; then
        # shellcheck disable=SC1091
        source .venv/bin/activate
        PYTHON=${PYTHON:-python}
    fi
    export PYTHON=${PYTHON:-python}

    # A node that died and is back gets the order to end its former step late, and steps are numbered from 0 at every
    # start: this one has to have another number.
    local skipped
    for ((skipped = 0; skipped < restarts % 4; skipped++)); do srun --nodes=1 --ntasks=1 --quiet true || true; done

    echo "$(date '+%F %T') start $restarts on $SLURM_JOB_NODELIST, rendezvous $MAIN_ADDR:$MAIN_PORT;" \
        "output in $run_dir/node-N.log"
    srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=120 \
        --open-mode=append --output="$run_dir/node-%n.log" "${options[@]}" bash launch/slurm/node.sh "$@" || code=$?

    local stopped lost
    stopped=$(nodes_that_say 75) lost=$(nodes_that_say running)
    if [[ -n $stopped ]]; then
        # all ranks agree to stop and save together, so one node that says so speaks for all
        queue_again "stopped early with a checkpoint" "$restarts" "$max_restarts"
    elif [[ $code -eq 0 ]]; then
        echo "$(date '+%F %T') done"
    elif [[ -n $lost ]]; then
        queue_again "node ${lost% } died" "$restarts" "$max_restarts"
    else
        report_failure "$run_dir"
    fi
    exit "$code"
}

free_port() { # NUMBER: the first port from there on that nobody listens on, of 12000 to 29999; this is the first node
    local number port
    for ((number = $1; number < $1 + 1000; number++)); do
        port=$((12000 + number % 18000))
        (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

nodes_that_say() { # WORD: numbers of the nodes whose last word it is
    local file
    for file in "$STATE_DIR"/node-*; do
        if [[ $(cat "$file" 2>/dev/null) == "$1" ]]; then echo -n "${file##*-} "; fi
    done
}

queue_again() { # WHY RESTARTS MAX_RESTARTS
    if (($2 >= $3)); then
        echo "$(date '+%F %T') $1; not queued again after $2 restarts (MAX_RESTARTS=$3)"
        exit 75
    fi
    echo "$(date '+%F %T') $1; queued again (restart $(($2 + 1)) of at most $3)"
    scontrol requeue "$SLURM_JOB_ID" || { echo "the job cannot be requeued; submit it again" && exit 75; }
    sleep 60 # SLURM ends this shell
    exit 75
}

report_failure() { # RUN_DIR: say which node failed first and what it said last; sets `code` to its exit code
    local file said first=""
    echo "$(date '+%F %T') failed; not queued again"
    for file in "$STATE_DIR"/node-*; do
        said=$(cat "$file" 2>/dev/null) || continue
        [[ $said =~ ^[1-9] ]] || continue
        # a user's mistake (2) is a cause; a 1 may be that a peer has gone
        if [[ -z $first || $said == 2 && $code != 2 || $file -ot $first && ($said == 2 || $code != 2) ]]; then
            first=$file code=$said
        fi
    done
    [[ -n $first ]] || return 0
    echo "node ${first##*-} ended with exit code $code; the end of $1/node-${first##*-}.log:"
    tail -n 20 "$1/node-${first##*-}.log"
}
