#!/bin/bash
#SBATCH --job-name=xcon-reproduce
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=16 --mem=64G --time=24:00:00
#SBATCH --output=%x-%A_%a.out --open-mode=append --requeue
# The paper's table: each task of the array does a part of it, and the last to end makes the table. From the top of
# the repository:
#   sbatch --array=0-20 [--gres=gpu:1 ...] slurm/reproduce.sh --shards DIR --out DIR [--field value ...]
# The arguments are those of `xcon reproduce`, whose --list says how many parts there are: 21 of size paper with three
# seeds, 18 of laptop. Submitted again, or requeued, a task goes on where it was; one whose part is done ends at once.
# Tasks that end together may both make the table: it is the same one, and each file is replaced whole.
# Site and container: see slurm/site.sh.
set -euo pipefail
source slurm/site.sh || { echo "submit from the top of the repository" >&2 && exit 2; }
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "no task of an array: sbatch --array=0-20 slurm/reproduce.sh --shards DIR --out DIR [...]" >&2
  exit 2
fi
share_cores
echo "xcon: task $SLURM_ARRAY_TASK_ID on $(hostname), $workers worker(s), $OMP_NUM_THREADS thread(s)," \
  "restart ${SLURM_RESTART_COUNT:-0}"
# First, so that a number of workers given by the user wins.
become xcon reproduce --workers "$workers" --task "$SLURM_ARRAY_TASK_ID" "$@"
