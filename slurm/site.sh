# shellcheck shell=bash
# What differs between clusters. Sourced by the job scripts and, before a download on a login node, by you:
# `source slurm/site.sh` points the caches where the jobs will look for them.
#
# What a job must know at submission cannot come from here; sbatch reads it from its command line or environment:
#   NYU Torch   export SBATCH_ACCOUNT=torch_pr_XXX_XXXXX      mandatory; `my_slurm_accounts` lists yours
#               sbatch --gres=gpu:4 --constraint='h200|l40s' slurm/pretrain.sh ...           and no --partition
#   NYU Greene  sbatch --gres=gpu:rtx8000:4 slurm/pretrain.sh ...
#   others      sbatch [--partition=...] --gres=gpu:4 slurm/pretrain.sh ...
#
# Settings, all from the environment (sbatch hands it on to the job):
#   XCON_SITE                greene, torch or other; default: SLURM's name for the cluster (not verified at NYU: set it)
#   XCON_IMAGE               Apptainer/Singularity image to run in, a path or a name in the site's folder; default: none
#   XCON_OVERLAY             its read-only overlay with the Python environment
#   XCON_ENV                 the file to source for that environment; default: .venv/bin/activate, in an image /ext3/env.sh
#   XCON_ACCELERATE_CONFIG   the strategy; default: accelerate_configs/ddp.yaml
#   SCRATCH                  large fast storage for the caches; default on NYU's clusters: /scratch/$USER

XCON_SITE=${XCON_SITE:-${SLURM_CLUSTER_NAME:-other}}
container_tool=apptainer
images=.
scratch=${SCRATCH:-}
case ${XCON_SITE,,} in
  greene)
    container_tool=singularity
    images=/scratch/work/public/singularity
    scratch=${scratch:-/scratch/$USER}
    ;;
  torch)
    images=/share/apps/images
    scratch=${scratch:-/scratch/$USER}
    ;;
esac

# Caches default to the home directory, which is small and counts files.
if [ -n "$scratch" ]; then
  export HF_HOME=${HF_HOME:-$scratch/xcon-cache/huggingface}
  export TORCH_HOME=${TORCH_HOME:-$scratch/xcon-cache/torch}
  export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$scratch/xcon-cache/xdg}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/xcon-cache/triton}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$scratch/xcon-cache/torch-extensions}
fi

export PYTHONSAFEPATH=1 # keeps xcon/ itself off sys.path, where its modules could shadow others
export PYTHONUNBUFFERED=1
if [ -n "${SLURM_JOB_ID:-}" ]; then
  export HF_HUB_OFFLINE=1 # compute nodes may have no network; what a job needs is fetched before
fi

container=()
environment=${XCON_ENV:-.venv/bin/activate}
if [ -n "${XCON_IMAGE:-}" ]; then
  [ -e "$XCON_IMAGE" ] || XCON_IMAGE=$images/$XCON_IMAGE
  container=("$container_tool" exec --nv ${XCON_OVERLAY:+--overlay "$XCON_OVERLAY:ro"} "$XCON_IMAGE")
  environment=${XCON_ENV:-/ext3/env.sh}
fi

# Becomes COMMAND, in the container if there is one, with the Python environment active; `exec`, so that a signal
# for the job reaches it.
become() { # COMMAND [ARGUMENT ...]
  # shellcheck disable=SC2016 # expanded inside
  exec "${container[@]}" bash -c 'source "$0" && exec "$@"' "$environment" "$@"
}

# Shares this node's cores out: sets `processes`, one per GPU or one without, `workers`, each one's to decode, and the
# threads of each.
# shellcheck disable=SC2034 # the caller reads them
share_cores() {
  local cpus=${SLURM_CPUS_PER_TASK:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
  if ((gpus > 0)); then
    processes=$gpus
    workers=$((cpus > gpus ? cpus / gpus - 1 : 0)) # the process itself needs a core, too
    export OMP_NUM_THREADS=1
  else
    processes=1
    workers=$((cpus / 4)) # decoding is a small part of a step that no GPU computes
    export OMP_NUM_THREADS=$((cpus - workers))
    export CUDA_VISIBLE_DEVICES= # no GPU was allotted, so none is used, even if one can be seen
  fi
}

# Runs an entry point on all nodes of this job as one world: one task per node, each of them slurm/launch.sh.
train() { # SCRIPT RECIPE [ARGUMENT ...]
  if [ $# -lt 2 ]; then
    echo "usage: sbatch slurm/$(basename "$1" .py).sh RECIPE --shards DIR --out RUN [--field value ...]" >&2
    exit 2
  fi
  read -r XCON_HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export XCON_HEAD
  # srun takes --cpus-per-task no longer from the job (SLURM 22.05 on): without it a step gets one core.
  exec srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    bash slurm/launch.sh "$@"
}
