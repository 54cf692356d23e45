#!/bin/sh
# One run over several nodes: sbatch examples/slurm.sh my-run.yaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# The cores of a node: by default SLURM gives a task one, which all its ranks would share.
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# SLURM sends USR1 five minutes before the time limit: the engine finishes its step and saves.
#SBATCH --signal=B:USR1@300
# A job that is pre-empted, or whose time is up, is queued again and resumes its session.
#SBATCH --requeue
#SBATCH --open-mode=append

# Sessions and this checkout must be on a file system that all nodes share.
RLHF_TUI="${RLHF_TUI:-.venv/bin/rlhf-tui}"
NAME="${NAME:-slurm-$SLURM_JOB_ID}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$first:${PORT:-29400}"

# The other nodes wait for the run and join it.
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$first" \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" "$RLHF_TUI" join "$address" &
fi

"$RLHF_TUI" run "$1" --headless --name "$NAME" --resume-if-exists -o launch.preempted_exit=75 \
    -o launch.nodes="$SLURM_NNODES" -o launch.rendezvous="$address" &
engine=$!
# SLURM signals this script, which forwards the signal to the engine. To follow the run, use
# `rlhf-tui attach` on the first node.
trap 'kill -USR1 $engine' USR1 TERM
# A signal interrupts `wait`, which then has not the engine's exit code yet.
while :; do wait $engine; code=$?; kill -0 $engine 2>/dev/null || break; done
# 75: stopped by the signal before its last step.
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
