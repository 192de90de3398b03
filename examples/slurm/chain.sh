#!/bin/bash
# Phase 1, then phase 2 from its last checkpoint, then the average of phase 2's last checkpoints: three jobs, each waits
# for the success of the one before. One command submits them:
#
#   RUNS=/scratch/runs DATA=/data/uniref50 examples/slurm/chain.sh
#   RUNS=/scratch/runs DATA=/data/uniref50 examples/slurm/chain.sh optim.lr=1e-4 seed=7        key=value for both phases
#
# A phase that is stopped and queues itself again keeps its place: the next one keeps waiting. If one fails, those after
# it are cancelled. Settings, as variables of the environment, besides those of pretrain.sbatch:
#   NAME                          the runs are NAME-phase1 and NAME-phase2; default: esm1nv
#   PHASE1_RECIPE, PHASE2_RECIPE  default: esm1nv_phase1 and esm1nv_phase2
#   PHASE1_NODES, PHASE2_NODES    default: 22 and 18
#   PHASE1, PHASE2                more key=value for one phase, separated by blanks
#   LAST                          how many checkpoints are averaged; default: 47
#   SBATCH_OPTIONS                more options for sbatch, for both phases, separated by blanks
#   AVERAGE_OPTIONS               the same for the third job, which needs one core and no GPU
# Account, partition and quality of service of all three: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, the variables of sbatch.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for argument in "$@"; do
    [[ "$argument" == *=* && "$argument" != -* ]] || {
        echo "error: $argument is not key=value; options for sbatch go into SBATCH_OPTIONS" >&2
        exit 2
    }
done
export RUNS=${RUNS:-$PWD/runs}
NAME=${NAME:-esm1nv}
LAST=${LAST:-47}
first=$RUNS/$NAME-phase1 second=$RUNS/$NAME-phase2
average=$second/averaged-last-$LAST.nemo
read -ra options <<<"${SBATCH_OPTIONS:-}"
read -ra average_options <<<"${AVERAGE_OPTIONS:-}"
read -ra phase1 <<<"${PHASE1:-}"
read -ra phase2 <<<"${PHASE2:-}"

submitted=()
submit() { # SBATCH-ARGUMENT... ; prints the job's id. If this is refused, cancel the jobs before it.
    local id
    id=$(sbatch --parsable "$@") || {
        [[ ${#submitted[@]} -eq 0 ]] || scancel "${submitted[@]}"
        echo "error: sbatch refused; nothing stays in the queue" >&2
        exit 1
    }
    submitted+=("${id%%;*}")
}

submit --job-name="$NAME-phase1" --nodes="${PHASE1_NODES:-22}" "${options[@]}" "$here/pretrain.sbatch" \
    recipe="${PHASE1_RECIPE:-esm1nv_phase1}" exp_manager.name="$NAME-phase1" "$@" "${phase1[@]}"
submit --job-name="$NAME-phase2" --nodes="${PHASE2_NODES:-18}" "${options[@]}" \
    --dependency="afterok:${submitted[0]}" --kill-on-invalid-dep=yes "$here/pretrain.sbatch" \
    recipe="${PHASE2_RECIPE:-esm1nv_phase2}" exp_manager.name="$NAME-phase2" continue_from_path="$first" \
    "$@" "${phase2[@]}"
submit --job-name="$NAME-average" "${average_options[@]}" --dependency="afterok:${submitted[1]}" --kill-on-invalid-dep=yes \
    "$here/average.sbatch" checkpoints="$second/averaging/*.nemo" last="$LAST" output="$average"

cat <<END
Submitted: phase 1 is job ${submitted[0]}, phase 2 is job ${submitted[1]}, the average is job ${submitted[2]}.
  watch   squeue --job ${submitted[0]},${submitted[1]},${submitted[2]}
          tail -F $NAME-phase1-${submitted[0]}.log
  stop    scancel --signal=TERM ${submitted[0]}    saves, and queues itself again
          scancel ${submitted[0]}                  saves, and is over; those after it are cancelled
  cancel  scancel ${submitted[*]}
  result  $average
END
