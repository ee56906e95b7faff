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
#   XCON_OVERLAY             its read-only overlay with the Python environment: an .ext3 or a squashed .sqf
#   XCON_ENV                 the file to source for that environment; default: .venv/bin/activate, in an image /ext3/env.sh
#   XCON_ACCELERATE_CONFIG   the strategy; default: accelerate_configs/ddp.yaml
#   XCON_STAGE               folder on the nodes' own disks that shards are copied to; default: $SLURM_TMPDIR, where a site
#                            sets it, else no copy is made; empty: no copy
#   XCON_GPUS                GPUs of a node, where SLURM does not count them; default: $SLURM_GPUS_ON_NODE
#   XCON_JOBS                folder that all nodes see, for a job's notes on why it stopped; default: slurm/jobs
#   XCON_MAX_RESTARTS        how often a job that was stopped goes back into the queue; default: 50
#   XCON_MAX_IDLE            how often in a row without having got any further; default: 3
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
  export APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$scratch/xcon-cache/apptainer}
  export SINGULARITY_CACHEDIR=${SINGULARITY_CACHEDIR:-$APPTAINER_CACHEDIR}
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this checkout, whatever version an image has installed
export PYTHONSAFEPATH=1 # keeps xcon/ itself off sys.path, where its modules could shadow others
export PYTHONUNBUFFERED=1
if [ -n "${SLURM_JOB_ID:-}" ]; then
  export HF_HUB_OFFLINE=1 # compute nodes may have no network; what a job needs is fetched before
fi

XCON_STAGE=${XCON_STAGE-${SLURM_TMPDIR:-}}
XCON_JOBS=${XCON_JOBS:-slurm/jobs}
XCON_MAX_RESTARTS=${XCON_MAX_RESTARTS:-50}
XCON_MAX_IDLE=${XCON_MAX_IDLE:-3}

container=()
environment=${XCON_ENV:-.venv/bin/activate}
if [ -n "${XCON_IMAGE:-}" ]; then
  if [[ $XCON_IMAGE != *://* && ! -e $XCON_IMAGE ]]; then XCON_IMAGE=$images/$XCON_IMAGE; fi
  container=("$container_tool" exec --nv ${XCON_OVERLAY:+--overlay "$XCON_OVERLAY:ro"})
  environment=${XCON_ENV:-/ext3/env.sh}
fi

# Becomes COMMAND, in the container if there is one, with the Python environment active; `exec`, so that a signal
# for the job reaches it. A signal that this shell ignores is ignored anew inside: a container's tool, written in Go,
# handles it, and what is handled has its default effect, the end, in what the tool starts.
become() { # COMMAND [ARGUMENT ...]
  local ignored folder
  ignored=$(trap -p TERM USR1)
  if [ -n "${XCON_IMAGE:-}" ]; then
    if [[ $XCON_IMAGE != *://* && ! -e $XCON_IMAGE ]]; then
      echo "xcon: $XCON_IMAGE: no such image; XCON_IMAGE is a path, or a name in $images" >&2
      exit 2
    fi
    for folder in "$scratch" "$XCON_JOBS" "$XCON_STAGE"; do # a folder that is not there would be the tool's error
      if [ -d "$folder" ]; then container+=(--bind "$(realpath --no-symlinks "$folder")"); fi
    done
    container+=("$XCON_IMAGE")
  fi
  # shellcheck disable=SC2016 # expanded inside
  exec "${container[@]}" bash -c "${ignored:+$ignored; }"'source "$0" && exec "$@"' "$environment" "$@"
}

# Shares this node's cores out: sets `processes`, one per GPU or one without, `workers`, each one's to decode, and the
# threads of each.
# shellcheck disable=SC2034 # the caller reads them
share_cores() {
  local cpus=${SLURM_CPUS_PER_TASK:-1} gpus=${XCON_GPUS:-${SLURM_GPUS_ON_NODE:-0}}
  if ((gpus == 0)) && [ -z "${XCON_GPUS:-}" ] && sees_gpus; then
    echo "xcon: $(hostname) has GPUs and SLURM gave the job none: it computes on the processor; ask with --gres=gpu:N," \
      "or set XCON_GPUS=N where SLURM does not count them" >&2
  fi
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

sees_gpus() {
  compgen -G "/dev/nvidia[0-9]*" >/dev/null
}
