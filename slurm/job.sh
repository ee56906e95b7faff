# shellcheck shell=bash
# What the job scripts share, sourced by them: `run` does their one step on all nodes of the job, and puts the job back
# into the queue when a signal stopped the step before it was done.
source slurm/site.sh

# A signal that says "stop soon" comes to the processes of the step, on every node (slurm/launch.sh): the trainer saves,
# names its step in the file XCON_STOPPED, and ends. One that comes before a trainer hears it leaves the file XCON_ASKED.
# SIGTERM comes to this shell too only when SLURM itself ends the job: by scancel, and then it must not come back, or to
# requeue it.
run() { # SCRIPT | COMMAND, ARGUMENT ...
  local notes=$XCON_JOBS/$SLURM_JOB_ID status=0 ended='' stopped=''
  if ((${SLURM_RESTART_COUNT:-0} == 0)); then rm -rf "$notes"; fi # of a job that had the same number
  mkdir -p "$notes"
  notes=$(realpath --no-symlinks "$notes") # as a container sees it
  export XCON_STOPPED=$notes/stopped XCON_ASKED=$notes/asked XCON_FAILED=$notes/failed
  rm -f "$XCON_STOPPED" "$XCON_ASKED" "$XCON_FAILED"
  read -r XCON_HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export XCON_HEAD

  trap 'ended=1' TERM # bash waits for the step all the same
  trap : USR1
  # A step of its own, for all nodes to begin the training together: one copies while another has the copy already.
  if [ -n "$XCON_STAGE" ]; then on_every_node bash slurm/stage.sh copy "$@" || true; fi
  if [ -e "$XCON_ASKED" ]; then
    status=75 stopped="the copying of shards" # EX_TEMPFAIL, as a trainer's
  else
    # When one process fails, the others fail for want of it. They are not killed: if the reason is a lost node, the
    # job would have failed before SLURM misses the node and requeues it, and SLURM (22.05) would deliver the kill when
    # the node answers again, to the step of the next run, which has the same name.
    on_every_node --kill-on-bad-exit=0 bash slurm/launch.sh "$@" || status=$?
    if ((status)) && [ -s "$XCON_STOPPED" ]; then stopped=$(cat "$XCON_STOPPED"); fi
  fi

  if [ -n "$XCON_STAGE" ] && [ -z "$ended" ]; then
    on_every_node bash slurm/stage.sh remove "$@" || true # a copy that stays does no harm
  fi
  if [ -n "$stopped" ] && [ -z "$ended" ]; then requeue "$notes" "stopped at $stopped"; fi
  if [ -s "$XCON_FAILED" ]; then echo "failed: $(head -n 1 "$XCON_FAILED")" >&2; fi # below all that launchers say
  rm -r "$notes"
  exit "$status"
}

# One task per node. srun takes --cpus-per-task no longer from the job (SLURM 22.05 on): without it a step gets a core.
on_every_node() { # [OPTION ...] COMMAND [ARGUMENT ...]
  srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@"
}

# Ends this run of the job in favour of another, unless that leads nowhere; returns when it does.
requeue() { # NOTES REASON
  local restarts=${SLURM_RESTART_COUNT:-0} reasons=$1/reasons
  # Of an array's last task SLURM_JOB_ID is also the number of the whole array.
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  echo "$2" >>"$reasons"
  if ((restarts >= XCON_MAX_RESTARTS)); then
    echo "xcon: $2; given up after $restarts restarts (XCON_MAX_RESTARTS)" >&2
  elif (($(tail -n "$XCON_MAX_IDLE" "$reasons" | grep -cxF "$2") >= XCON_MAX_IDLE)); then
    echo "xcon: $2, $XCON_MAX_IDLE times in a row; given up (XCON_MAX_IDLE)" >&2
  else
    echo "xcon: $2; back into the queue, restart $((restarts + 1)) of at most $XCON_MAX_RESTARTS"
    if scontrol requeue "${job:-$SLURM_JOB_ID}"; then exit 0; fi
    echo "xcon: SLURM refuses that; submitted again with the same arguments, the job goes on" >&2
  fi
}
