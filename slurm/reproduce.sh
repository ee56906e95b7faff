#!/bin/bash
#SBATCH --job-name=xcon-reproduce
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=16 --mem=64G --time=24:00:00
#SBATCH --output=%x-%j.out --open-mode=append --requeue --signal=USR1@300 --kill-on-invalid-dep=yes
# The paper's table: each task of an array does some rows with one seed, then a job without an array makes the table.
# From the top of the repository:
#   job=$(sbatch --parsable --array=0-20 [--gres=gpu:1 ...] slurm/reproduce.sh --shards DIR --out DIR [...])
#   sbatch --dependency=afterok:$job slurm/reproduce.sh --shards DIR --out DIR [...]
# The arguments are those of `xcon reproduce`, whose --list says how many parts there are: 21 of size paper with three
# seeds, 18 of laptop. What is done is not done again: the job without an array also does what is still missing.
# Site and container: see slurm/site.sh.
set -euo pipefail
source slurm/job.sh || { echo "submit from the top of the repository" >&2 && exit 2; }
run xcon reproduce "$@" ${SLURM_ARRAY_TASK_ID:+--task "$SLURM_ARRAY_TASK_ID"}
