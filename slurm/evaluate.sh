#!/bin/bash
#SBATCH --job-name=xcon-evaluate
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=16 --mem=64G --time=4:00:00
#SBATCH --output=%x-%j.out --open-mode=append --requeue --kill-on-invalid-dep=yes
# Evaluation on one node or many, each record once. From the top of the repository:
#   sbatch [--nodes=2 --gres=gpu:4 ...] slurm/evaluate.sh RUN --shards DIR [--split test] [--field value ...]
# The arguments are those of `xcon predict`. Requeued, it begins again: it takes minutes.
# Site, container and strategy: see slurm/site.sh.
set -euo pipefail
source slurm/job.sh || { echo "submit from the top of the repository" >&2 && exit 2; }
run xcon/predict.py "$@"
