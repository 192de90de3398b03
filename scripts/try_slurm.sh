#!/bin/bash
# Test the job scripts with a real one-node Slurm on this machine: time limit, preemption, requeue, a user error, a
# crash, and the chain of two phases and their average. Needs root and Debian (or Ubuntu). Takes about seven minutes on
# two cores.
#
#   sudo scripts/try_slurm.sh                          all parts
#   sudo scripts/try_slurm.sh whole time_limit         parts: whole time_limit preemption cancel mistake crash chain
#
# apt-get installs Slurm and munge if they are missing; they stay installed. The script uses the network only for this,
# and for `make` if there is no virtual environment yet. The daemons run from a temporary folder on their own ports and
# are stopped at the exit. No file in /etc changes.
#
#   VENV      virtual environment with bionemo_esm; default: the checkout's .venv, which `make` sets up
#   KEEP=1    leave the folder with logs and runs
#   SECONDS_OF_TRAINING   training time of an uninterrupted run of the comparison; default: 70

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
TRAINING=${SECONDS_OF_TRAINING:-70}
HOST=$(hostname -s)
SMALL=(recipe=laptop model.num_layers=2 model.hidden_size=64 model.num_attention_heads=4 model.ffn_hidden_size=256
    model.seq_length=256 model.hidden_dropout=0.1 data.micro_batch_size=8 data.global_batch_size=16 trainer.precision=32
    trainer.val_check_interval=1000000 trainer.limit_val_batches=4 trainer.log_every_n_steps=50
    exp_manager.create_tensorboard_logger=false exp_manager.checkpoints.every_n_train_steps=100)

# --- output ------------------------------------------------------------------------------------------------------------

clean() { sed -u "s#$WORK/##g; s#$WORK#.#g; s#$ROOT/##g; s#\b$HOST\b#node1#g"; }

say() { printf '[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" | clean; }

show() { # COMMAND...
    say "\$ $*"
    "$@" 2>&1 | clean
}

die() {
    say "FAILED: $*"
    exit 1
}

check() { # WHAT COMMAND...: print WHAT if the command succeeds, else exit
    local what=$1
    shift
    "$@" || die "$what"
    say "ok: $what"
}

# --- Slurm -------------------------------------------------------------------------------------------------------------

install_packages() {
    if hash slurmctld slurmd munged sbatch 2>/dev/null; then
        return
    fi
    say "installing slurm-wlm and munge (they stay; apt-get purge slurm-wlm munge && apt-get autoremove removes them)"
    local policy=/usr/sbin/policy-rc.d made=no
    if [[ ! -e $policy ]]; then # keeps the packages from starting their own daemons
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && made=yes
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >"$WORK/apt.log" 2>&1 ||
        die "apt-get: $(tail -n 3 "$WORK/apt.log")"
    [[ $made == no ]] || rm $policy
}

configure() {
    mkdir -p "$WORK"/{state,spool,munge,log}
    (umask 077 && head -c 1024 /dev/urandom >"$WORK/munge/key")
    cat >"$SLURM_CONF" <<END
ClusterName=try
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/socket
CredType=cred/munge
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
SlurmctldLogFile=$WORK/log/slurmctld.log
SlurmdLogFile=$WORK/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=7200
KillWait=30
SlurmdParameters=config_overrides
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=2 RealMemory=32000 State=UNKNOWN
PartitionName=batch Nodes=$HOST Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=$HOST PriorityTier=10 PreemptMode=OFF State=UP
END
}

start_daemons() {
    munged --force --socket="$WORK/munge/socket" --key-file="$WORK/munge/key" --pid-file="$WORK/munge/pid" \
        --log-file="$WORK/munge/log" --seed-file="$WORK/munge/seed"
    slurmctld
    slurmd
    wait_for 30 "the node to be idle" node_is_idle
}

node_is_idle() { sinfo --noheader --format=%t 2>/dev/null | grep -qx idle; }

stop_daemons() { # also after a failure: stops all that run
    trap - EXIT
    if [[ -e "$WORK/slurmctld.pid" ]]; then
        timeout 20 scancel --user=root >/dev/null 2>&1 || true
        for _ in {1..40}; do
            [[ -n "$(timeout 5 squeue --noheader 2>/dev/null || true)" ]] || break
            sleep 1
        done
    fi
    for file in "$WORK/slurmd.pid" "$WORK/slurmctld.pid" "$WORK/munge/pid"; do
        [[ ! -s "$file" ]] || kill "$(<"$file")" 2>/dev/null || true
    done
    sleep 1
    if [[ -n "${KEEP:-}" ]]; then
        echo "kept: $WORK"
    else
        rm -rf "$WORK"
    fi
}

# --- jobs --------------------------------------------------------------------------------------------------------------

wait_for() { # SECONDS WHAT COMMAND...
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [[ $SECONDS -lt $limit ]] || die "waited too long for $what"
        sleep 1
    done
}

field() { # JOB NAME: of `scontrol show job`
    scontrol show job "$1" | grep -oP "(?<=\b$2=)\S+" | sed -n 1p
}

is_over() { [[ "$(field "$1" JobState)" =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }

log_of() { echo "$WORK/$(field "$1" JobName)-$1.log"; }

log_has() { grep -q "$2" "$(log_of "$1")" 2>/dev/null; } # JOB TEXT

waits() { [[ "$(field "$1" JobState)" == PENDING ]]; }

has_saved() { compgen -G "$1/checkpoints/step-*.ckpt" >/dev/null; } # RUN

runs_again() { [[ "$(grep -c 'resuming from step' "$(log_of "$1")")" -ge "$2" ]]; } # JOB TIMES

hasten() { # JOB: shorten Slurm's delay of two minutes for a requeued job; slurmd needs a few seconds of it
    wait_for 60 "job $1 to be queued again" waits "$1"
    sleep 5
    scontrol update jobid="$1" starttime=now
}

finish() { # JOB STATE
    wait_for 900 "job $1 to end" is_over "$1"
    check "job $1 is $2 (exit code $(field "$1" ExitCode), restarts $(field "$1" Restarts))" \
        test "$(field "$1" JobState)" = "$2"
}

submit() { # SBATCH-OPTION... -- KEY=VALUE...: sets `job` to the job's id. Each run has its own folder RUNS/NAME.
    local mine=()
    while [[ "$1" != -- ]]; do
        mine+=("$1")
        shift
    done
    shift
    say "\$ sbatch ${mine[*]} examples/slurm/pretrain.sbatch $* ..."
    job=$(sbatch --parsable "${TWO_RANKS[@]}" "${mine[@]}" "$ROOT/examples/slurm/pretrain.sbatch" "${SMALL[@]}" "$@")
    say "job $job"
}

same_model() { # NAME: compare model and average of that run with those of the uninterrupted run
    cmp "$RUNS/$1/laptop.nemo" "$RUNS/whole/laptop.nemo" &&
        cmp "$RUNS/$1/laptop-averaged.nemo" "$RUNS/whole/laptop-averaged.nemo"
}

story() { grep -E '^==|^Stopped|going on from|after the|copied to|is there$|^error|^Done' "$(log_of "$1")" | sed 's/^/        | /' | clean; }

# --- parts -------------------------------------------------------------------------------------------------------------

try_pace() {
    say "--- a short run, to choose the length of the others: about $TRAINING s of training"
    submit --job-name=pace -- trainer.max_steps=200 exp_manager.name=pace
    finish "$job" COMPLETED
    steps=$("$VENV/bin/python" - "$RUNS/pace/metrics.jsonl" "$TRAINING" <<'END'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
(a, b) = [line for line in lines if line["kind"] == "train"][1::2][:2]
rate = (b["step"] - a["step"]) / (b["seconds"] - a["seconds"])
print(max(400, round(rate * float(sys.argv[2]), -2)))
END
    )
    steps=${steps%.*}
}

try_whole() {
    say "--- a run that nothing happens to"
    submit --job-name=whole -- trainer.max_steps="$steps" exp_manager.name=whole
    finish "$job" COMPLETED
    story "$job"
}

try_time_limit() {
    say "--- the time limit: shortened while the job trains, so that it is less than two minutes away"
    submit --job-name=limit --signal=TERM@120 -- trainer.max_steps="$steps" exp_manager.name=limit
    wait_for 300 "a checkpoint" has_saved "$RUNS/limit"
    local seconds
    seconds=$(($(date +%s) - $(date -d "$(field "$job" StartTime)" +%s)))
    show scontrol update jobid="$job" timelimit=$((seconds / 60 + 2))
    wait_for 120 "the signal" log_has "$job" 'stopped: queued again'
    scontrol update jobid="$job" timelimit=30
    hasten "$job"
    finish "$job" COMPLETED
    story "$job"
    check "it was started twice" test "$(field "$job" Restarts)" = 1
    check "model and average have the bytes of the run that nothing happened to" same_model limit
}

try_preemption() {
    say "--- preemption by a job of a partition of higher priority, with a grace time; then scontrol requeue, without"
    submit --job-name=preempted -- trainer.max_steps="$steps" exp_manager.name=preempted
    wait_for 300 "a checkpoint" has_saved "$RUNS/preempted"
    local urgent
    urgent=$(sbatch --parsable --partition=urgent --job-name=urgent --ntasks=2 --output=/dev/null --wrap='sleep 5')
    say "\$ sbatch --partition=urgent --ntasks=2 --wrap='sleep 5'    (job $urgent)"
    wait_for 120 "the save" log_has "$job" '^Stopped by SIGTERM'
    finish "$urgent" COMPLETED
    hasten "$job"
    wait_for 300 "it to go on" runs_again "$job" 1
    sleep 5
    show scontrol requeue "$job"
    wait_for 60 "the save" log_has "$job" 'Slurm ends this job'
    hasten "$job"
    finish "$job" COMPLETED
    story "$job"
    check "it was started three times" test "$(field "$job" Restarts)" = 2
    check "model and average have the bytes of the run that nothing happened to" same_model preempted
}

try_cancel() {
    say "--- scancel is meant: the state is saved, the job stays cancelled"
    submit --job-name=cancelled -- trainer.max_steps="$steps" exp_manager.name=cancelled
    wait_for 300 "a checkpoint" has_saved "$RUNS/cancelled"
    show scancel "$job"
    finish "$job" CANCELLED
    wait_for 60 "the last words" log_has "$job" 'Slurm ends this job'
    story "$job"
}

try_mistake() {
    say "--- a mistake of the user's (exit code 2) is not queued again"
    submit --job-name=mistake -- data.global_batch_size=1 exp_manager.name=mistake
    finish "$job" FAILED
    check "exit code 2, no restart" test "$(field "$job" ExitCode),$(field "$job" Restarts)" = 2:0,0
    tail -n 3 "$(log_of "$job")" | sed 's/^/        | /' | clean
}

try_crash() {
    say "--- a rank that is killed ends the others at once; not queued again"
    submit --job-name=crash -- trainer.max_steps="$steps" exp_manager.name=crash
    wait_for 300 "a checkpoint" has_saved "$RUNS/crash"
    local shell
    shell=$(scontrol listpids "$job.0" | awk '$5 == 1 { print $1 }')
    say "\$ kill -KILL <rank 1>"
    kill -KILL "$(pgrep --parent "$shell")"
    finish "$job" FAILED
    check "exit code 137, no restart" test "$(field "$job" ExitCode),$(field "$job" Restarts)" = 137:0,0
}

try_chain() {
    say "--- phase 1, stopped once on the way, phase 2, average; the data copied to a disk of the node"
    export DATA=$RUNS/pace/store DATA_LOCAL=$WORK/local
    say "\$ DATA=... DATA_LOCAL=... NAME=chain ... examples/slurm/chain.sh"
    NAME=chain LAST=3 PHASE1_RECIPE=laptop PHASE2_RECIPE=laptop PHASE1_NODES=1 PHASE2_NODES=1 \
        SBATCH_OPTIONS="${TWO_RANKS[*]}" PHASE1=trainer.max_steps=300 \
        PHASE2="trainer.max_steps=700 exp_manager.checkpoints.average_last=3" \
        "$ROOT/examples/slurm/chain.sh" "${SMALL[@]:1}" >"$WORK/chain.txt"
    unset DATA DATA_LOCAL
    sed 's/^/        | /' "$WORK/chain.txt" | clean
    local first second third
    read -r first second third < <(grep -oP '(?<=cancel  scancel ).*' "$WORK/chain.txt")
    wait_for 300 "a checkpoint" has_saved "$RUNS/chain-phase1"
    show scancel --signal=TERM "$first"
    hasten "$first"
    finish "$first" COMPLETED
    check "it was stopped and started again" test "$(field "$first" Restarts)" = 1
    story "$first"
    finish "$second" COMPLETED
    story "$second"
    finish "$third" COMPLETED
    tail -n 2 "$(log_of "$third")" | sed 's/^/        | /' | clean
    check "the average has the bytes of the one that phase 2 made at its end" \
        cmp "$RUNS/chain-phase2/averaged-last-3.nemo" "$RUNS/chain-phase2/laptop-averaged.nemo"
}

# --- main --------------------------------------------------------------------------------------------------------------

[[ $EUID -eq 0 ]] || { echo "error: munged and slurmd need root" >&2 && exit 2; }
[[ -x "$VENV/bin/bionemo-esm" ]] || make -C "$ROOT" .venv/.ready
WORK=$(mktemp -d /tmp/try_slurm.XXXXXX)
export SLURM_CONF=$WORK/slurm.conf RUNS=$WORK/runs VENV
TWO_RANKS=(--nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=30)
trap stop_daemons EXIT
cd "$WORK"
install_packages
configure
start_daemons
say "Slurm $(sinfo --version | cut -d' ' -f2): one node, two CPUs; every job below has two ranks (gloo)"
try_pace
[[ $# -gt 0 ]] || set -- whole time_limit preemption cancel mistake crash chain
for part in "$@"; do
    "try_$part"
done
say "all of it held"
