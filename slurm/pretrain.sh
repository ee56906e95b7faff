#!/bin/bash
#SBATCH --job-name=xcon-pretrain
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=16 --mem=64G --time=24:00:00
#SBATCH --output=%x-%j.out --open-mode=append --requeue --signal=USR1@300 --kill-on-invalid-dep=yes
# Pre-training on one node or many. From the top of the repository:
#   sbatch [--nodes=2 --gres=gpu:4 ...] slurm/pretrain.sh RECIPE --shards DIR --out RUN [--field value ...]
# The arguments are those of xcon/pretrain.py; submitted again, or requeued, the job goes on from RUN's last checkpoint.
# Site, container and strategy: see slurm/site.sh.
set -euo pipefail
source slurm/job.sh || { echo "submit from the top of the repository" >&2 && exit 2; }
run xcon/pretrain.py "$@"
