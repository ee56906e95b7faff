#!/bin/bash
# What `srun` starts once on every node. It becomes one Accelerate launcher, which starts a process per GPU, or one on
# a node without; or COMMAND itself. Everything that differs between nodes ($SLURM_NODEID) is evaluated here, on the node.
#
# SLURM signals every process of a step, launchers and helpers too. SIGTERM and SIGUSR1 are for the trainers, which save
# and stop; all others ignore them: what is ignored here stays so in every process, except where it is handled. Before
# a trainer handles them, and between the steps of `xcon reproduce`, nobody would hear them: a process beside all this
# notes in the file XCON_ASKED that one came.
set -euo pipefail
source slurm/site.sh
source slurm/stage.sh
trap '' TERM USR1
listen() {
  local never
  trap ': >"$XCON_ASKED"' TERM USR1
  exec {never}<> <(:) # a pipe without a writer: to read from it is to sleep
  while kill -0 $$; do read -rt 0.2 -u "$never" || true; done # as long as the process that this one becomes
}
listen </dev/null &>/dev/null &
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # torch's launcher would handle SIGTERM: it kills after 30 s

share_cores
nodes=$SLURM_NNODES

case " $* " in # a number given by the user wins
  *" --workers "* | *" --workers="*) ;;
  *) set -- "$@" --workers "$workers" ;;
esac

copy=
shards=$(shards_of "$@")
if [ -n "$XCON_STAGE" ] && [ -f "$shards/dataset.json" ]; then
  use "$shards"
  if [ -n "$copy" ]; then set -- "$@" --shards "$copy"; fi # the last one counts
fi

launcher=()
if [[ $1 == *.py ]]; then
  config=${XCON_ACCELERATE_CONFIG:-accelerate_configs/ddp.yaml}
  launcher=(
    accelerate launch --config_file "$config"
    --num_machines "$nodes" --num_processes $((nodes * processes)) --machine_rank "$SLURM_NODEID"
    --main_process_port $((10000 + SLURM_JOB_ID % 10000)) # each task of an array has its own job id, too
  )
  if ((nodes > 1)); then # alone, c10d would take one and the same port in every job
    # Nodes differ by minutes in starting a container and importing torch, and torch's launcher waits one for the head.
    launcher+=(--rdzv_backend c10d --rdzv_conf "read_timeout=900,join_timeout=1800" --main_process_ip "$XCON_HEAD")
  fi
fi

echo "xcon: node $((SLURM_NODEID + 1)) of $nodes ($(hostname)), ${launcher:+$processes process(es), $config,}" \
  "$OMP_NUM_THREADS thread(s), $workers worker(s), restart ${SLURM_RESTART_COUNT:-0}${copy:+, shards from $copy}"
become "${launcher[@]}" "$@"
