#!/bin/bash
#SBATCH --job-name=xcon-shards
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=8 --mem=16G --time=6:00:00
#SBATCH --output=%x-%j.out --open-mode=append --requeue
# Builds a shard set on a compute node. From the top of the repository:
#   sbatch slurm/build_shards.sh SOURCE --out DIR [...]
#   sbatch slurm/build_shards.sh nabirds --root nabirds.tar.gz --meta nabirds_with_loc_2019.json --out data/nabirds
# The arguments are those of `xcon-shards build`.
set -euo pipefail
source slurm/site.sh || { echo "submit from the top of the repository" >&2 && exit 2; }
become xcon-shards build "$@"
