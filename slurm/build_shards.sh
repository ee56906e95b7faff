#!/bin/bash
#SBATCH --job-name=xcon-shards
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=8 --mem=16G --time=6:00:00
#SBATCH --output=%x-%j.out --open-mode=append --requeue --kill-on-invalid-dep=yes
# Builds a shard set on a compute node, or on many: each task of an array makes a part of the shards, and the last to
# end writes the card. From the top of the repository:
#   sbatch [--array=0-7] slurm/build_shards.sh SOURCE --out DIR [...]
#   sbatch slurm/build_shards.sh nabirds --root nabirds.tar.gz --meta nabirds_with_loc_2019.json --out data/nabirds
# The arguments are those of `xcon-shards build`. Submitted again, or requeued, a task goes on where it was; submitted
# again without --array when no task runs any more, one job makes what is missing and the card. A part of an array,
# as --array=3, needs the number of all tasks: --tasks 8. Every task reads the source for itself.
set -euo pipefail
source slurm/site.sh || { echo "submit from the top of the repository" >&2 && exit 2; }
part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  part=(--task "$SLURM_ARRAY_TASK_ID")
  if [[ " $* " != *" --tasks "* ]]; then
    # shellcheck disable=SC2153 # SLURM's own, beside SLURM_ARRAY_TASK_ID
    if ((SLURM_ARRAY_TASK_MIN != 0 || SLURM_ARRAY_TASK_MAX + 1 != SLURM_ARRAY_TASK_COUNT)); then
      echo "xcon: not all tasks from 0 on; give --tasks N too, the number of tasks of the whole array" >&2
      exit 2
    fi
    part+=(--tasks "$SLURM_ARRAY_TASK_COUNT")
  fi
fi
# Before the user's, so that a number of workers given by the user wins.
become xcon-shards build "${@:1:1}" --workers "${SLURM_CPUS_PER_TASK:-1}" "${part[@]}" "${@:2}"
