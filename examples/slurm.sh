#!/bin/sh
# One run over several nodes: sbatch examples/slurm.sh my-run.yaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# The cores of a node: by default SLURM gives a task one, which all its ranks would share.
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# A job that is pre-empted, or whose time is up, is queued again and resumes its session.
#SBATCH --requeue
#SBATCH --open-mode=append

# Sessions and this checkout must be on a file system that all nodes share.
RLHF_TUI="${RLHF_TUI:-.venv/bin/rlhf-tui}"

# The engine saves and ends as late as it can before the time limit (train.save_before_deadline).
# Old versions of SLURM do not say when that is.
: "${SLURM_JOB_END_TIME:=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s)}"
export SLURM_JOB_END_TIME

# One task a node: the first one runs the engine, the others join it. To follow the run, use
# `rlhf-tui attach` on the first node.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$RLHF_TUI" launch "$1" &
tasks=$!
# A job that is pre-empted gets a SIGTERM first. srun passes signals on: the engine finishes its
# step and saves.
trap 'kill -USR1 $tasks' USR1 TERM
# A signal interrupts `wait`, which then has not the exit code of the tasks yet.
while :; do wait $tasks; code=$?; kill -0 $tasks 2>/dev/null || break; done
# 75: stopped before its last step.
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
