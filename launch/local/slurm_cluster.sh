#!/usr/bin/env bash
# A SLURM cluster of two nodes on this one machine, to try and to test the job scripts. Needs root and Debian's
# packages slurm-wlm and munge; no systemd. Both nodes see all of the machine's CPUs.
#
#   slurm_cluster.sh start DIR            start what is not running; prints the `export SLURM_CONF=...` to use it
#   slurm_cluster.sh status DIR           which daemons run, and sinfo
#   slurm_cluster.sh kill-node DIR NODE   SIGKILL a node's slurmd and everything of its jobs: a power cut.
#                                         `start` brings the node back
#   slurm_cluster.sh stop DIR             cancel the jobs and end everything that start began
#
# Everything lies under DIR: slurm.conf (written once), munge key, logs, state. A job that runs on both nodes of this
# machine needs MAIN_ADDR=127.0.0.1 and, with gloo, GLOO_SOCKET_IFNAME=lo.
set -euo pipefail

NODES=(node1 node2)

die() {
    echo "slurm_cluster.sh: $*" >&2
    exit 2
}

usage="usage: slurm_cluster.sh start|status|stop DIR, or kill-node DIR NODE"
[[ $# -ge 2 ]] || die "$usage"
verb=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd -P)
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf

# The pid in a pid file, if that process runs and is the named program (not another one that got its number).
running() { # PIDFILE PROGRAM
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 1
    [[ -n $pid && $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]] || return 1
    echo "$pid"
}

wait_until() { # SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

free_ports() { # three neighbouring ports that nobody listens on
    local base port taken
    for _ in {1..50}; do
        base=$((10000 + RANDOM % 20000)) taken=""
        for port in "$base" $((base + 1)) $((base + 2)); do
            if (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then taken=yes; fi
        done
        [[ -n $taken ]] || { echo "$base" && return; }
    done
    die "no free ports"
}

write_config() {
    local host port
    host=$(hostname)
    port=$(free_ports)
    # proctrack/linuxproc and task/none need no cgroups; config_overrides lets two nodes share the machine's CPUs;
    # cred_expire is how long a requeued job has to wait (120 s elsewhere); SlurmdTimeout is how soon a node counts
    # as dead (300 s elsewhere); jobs numbered from 1 would write to the logs of a former cluster's and meet another
    # cluster's jobs on their ports
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
FirstJobId=$port
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
SlurmdTimeout=10
KillWait=30
ReturnToService=2
JobRequeue=1
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdDebug=verbose
SlurmdLogFile=$dir/log/slurmd.%n.log
NodeName=node[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    [[ $(id -u) == 0 ]] || die "needs root"
    local program node
    for program in munged slurmctld slurmd; do
        command -v "$program" >/dev/null || die "$program is missing: apt-get install slurm-wlm munge"
    done
    mkdir -p "$dir"/{munge,state,log,spool/node1,spool/node2}
    [[ -f $SLURM_CONF ]] || write_config
    if [[ ! -f $dir/munge/key ]]; then
        (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    fi
    # --force: root may run it, and DIR may be anywhere; its socket serves this cluster alone
    running "$dir/munge/pid" munged >/dev/null || munged --force --socket="$dir/munge/socket" \
        --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" --log-file="$dir/log/munged.log" \
        --seed-file="$dir/munge/seed" 2>>"$dir/log/munged.log"
    running "$dir/slurmctld.pid" slurmctld >/dev/null || slurmctld
    for node in "${NODES[@]}"; do
        running "$dir/slurmd.$node.pid" slurmd >/dev/null || slurmd -N "$node"
    done
    wait_until 60 all_idle || die "the nodes did not come up; see $dir/log"
    echo "export SLURM_CONF=$SLURM_CONF"
}

all_idle() {
    [[ $(sinfo --noheader --Node --states=idle,mixed,allocated,completing --responding --format=%N | sort -u | wc -l) \
        -eq ${#NODES[@]} ]]
}

# slurmstepd leaves slurmd's process tree; its open log file says which node it belongs to.
steps_of() { # NODE
    local pid
    for pid in $(pgrep -x slurmstepd || true); do
        if readlink "/proc/$pid/fd/"* 2>/dev/null | grep -qxF "$dir/log/slurmd.$1.log"; then echo "$pid"; fi
    done
}

with_descendants() { # PID...
    local pid
    for pid in "$@"; do
        echo "$pid"
        # shellcheck disable=SC2046  # one argument a child
        with_descendants $(pgrep -P "$pid" || true)
    done
}

kill_node() { # NODE
    local victims
    # shellcheck disable=SC2046
    victims=$(with_descendants $(running "$dir/slurmd.$1.pid" slurmd || true) $(steps_of "$1"))
    # shellcheck disable=SC2086
    [[ -z $victims ]] || kill -KILL $victims 2>/dev/null || true
    rm -f "$dir/slurmd.$1.pid"
}

no_jobs() { [[ -z $(squeue --noheader) ]]; }

stop() {
    local node pid
    if [[ -f $SLURM_CONF ]] && running "$dir/slurmctld.pid" slurmctld >/dev/null; then
        scancel --state=PENDING --user=root || true
        scancel --signal=KILL --full --user=root || true
        scancel --user=root || true
        wait_until 15 no_jobs || true
    fi
    for node in "${NODES[@]}"; do kill_node "$node"; done
    if pid=$(running "$dir/slurmctld.pid" slurmctld); then kill -KILL "$pid"; fi
    if pid=$(running "$dir/munge/pid" munged); then kill -KILL "$pid"; fi
    rm -f "$dir/slurmctld.pid" "$dir/munge/pid"
}

status() {
    local node up=yes
    running "$dir/munge/pid" munged >/dev/null || { echo "munged is down" && up=""; }
    running "$dir/slurmctld.pid" slurmctld >/dev/null || { echo "slurmctld is down" && up=""; }
    for node in "${NODES[@]}"; do
        running "$dir/slurmd.$node.pid" slurmd >/dev/null || { echo "slurmd of $node is down" && up=""; }
    done
    [[ -n $up ]] || exit 1
    echo "export SLURM_CONF=$SLURM_CONF"
    sinfo
}

case $verb in
start) start ;;
stop) stop ;;
status) status ;;
kill-node)
    [[ $# -eq 3 && " ${NODES[*]} " == *" $3 "* ]] || die "$usage"
    kill_node "$3"
    ;;
*) die "$usage" ;;
esac
