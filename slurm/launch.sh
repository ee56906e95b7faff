#!/bin/bash
# What `srun` starts once on every node: one Accelerate launcher, which starts a process per GPU, or one on a node
# without. Everything that differs between nodes ($SLURM_NODEID) is evaluated here, on the node.
set -euo pipefail
source slurm/site.sh

config=${XCON_ACCELERATE_CONFIG:-accelerate_configs/ddp.yaml}
nodes=$SLURM_NNODES
share_cores

rendezvous=()
if ((nodes > 1)); then # alone, c10d would take one and the same port in every job
  rendezvous=(--rdzv_backend c10d --main_process_ip "$XCON_HEAD")
fi

case " $* " in # a number given by the user wins
  *" --workers "* | *" --workers="*) ;;
  *) set -- "$@" --workers "$workers" ;;
esac

echo "xcon: node $((SLURM_NODEID + 1)) of $nodes ($(hostname)), $processes process(es)," \
  "$OMP_NUM_THREADS thread(s) each, $config, restart ${SLURM_RESTART_COUNT:-0}"
become accelerate launch --config_file "$config" \
  --num_machines "$nodes" --num_processes $((nodes * processes)) --machine_rank "$SLURM_NODEID" \
  "${rendezvous[@]}" --main_process_port $((10000 + SLURM_JOB_ID % 10000)) \
  "$@"
