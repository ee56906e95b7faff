#!/bin/bash
# A real SLURM cluster, a login node and two compute nodes, on this one machine: for end-to-end tests of job scripts.
#
#   minislurm.sh start              installs SLURM when missing (Debian, Ubuntu) and waits until the nodes are idle
#   minislurm.sh exec COMMAND ...   runs it on the login node, in this directory and environment: exec sbatch job.sh
#   minislurm.sh status             one line per node
#   minislurm.sh crash NODE         kills a node and all that runs there
#   minislurm.sh boot NODE          brings it back
#   minislurm.sh stop               ends every process of the cluster and removes its folder
#
# Needs root on Linux. Every node has its own names, processes and network in kernel namespaces, and the machine's own
# are left alone: a job that takes `localhost` for another node fails here as it would on a real cluster. The file
# system is shared, as a cluster's is, but for $MINISLURM_DIR/local, 64 MB of each node's own. Processors and memory are
# what the settings say, not what the machine has; a GPU is a device node without a device.
#
# Settings: MINISLURM_DIR, MINISLURM_NODES, MINISLURM_CPUS, MINISLURM_MEM (MB), MINISLURM_GPUS (each per node),
# MINISLURM_CONF (more lines for slurm.conf). Clusters in different folders can run side by side.
set -euo pipefail

dir=${MINISLURM_DIR:-${TMPDIR:-/tmp}/minislurm}
nodes=${MINISLURM_NODES:-2}
cpus=${MINISLURM_CPUS:-8}
memory=${MINISLURM_MEM:-8000}
gpus=${MINISLURM_GPUS:-2}
network=10.77.0
me=$(realpath "$0")
export SLURM_CONF=$dir/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

fail() {
  echo "minislurm: $*" >&2
  exit 1
}

# The process id, seen from outside, of the cluster's process 1; nothing when the cluster does not run.
cluster_pid() {
  local pid
  pid=$(cat "$dir/pid" 2>/dev/null) || return
  # The number may be another's by now.
  grep -qsaF "_login" "/proc/$pid/cmdline" && echo "$pid"
}

# Runs COMMAND as a process of the login node.
inside() { # COMMAND [ARGUMENT ...]
  local pid
  pid=$(cluster_pid) || fail "not running; start it with: $me start"
  nsenter --target "$pid" --mount --uts --net --pid -- env --chdir="$PWD" "$@"
}

install_packages() {
  type munged slurmctld slurmd sbatch ip &>/dev/null && return
  type apt-get &>/dev/null || fail "needs munge, slurmctld, slurmd, the SLURM commands and iproute2"
  apt-get update -qq -o DPkg::Lock::Timeout=120 # another cluster may install at this moment
  # RUNLEVEL=1 keeps the packages from starting services of their own.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends -o DPkg::Lock::Timeout=120 \
    slurmctld slurmd slurm-client munge iproute2
}

write_hosts() {
  local i
  echo "127.0.0.1 localhost"
  echo "$network.254 login"
  for i in $(seq "$nodes"); do
    echo "$network.$i node$i"
  done
}

write_slurm_conf() {
  local gres=
  if ((gpus > 0)); then gres=Gres=gpu:$gpus; fi
  cat <<CONF
ClusterName=mini
SlurmctldHost=login($network.254)
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
MailProg=/bin/true

# All daemons share one munged by its socket. A requeued job waits until its old credential expires: 2 minutes otherwise.
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5

# No cgroups and no accounting; with config_overrides a node has what its line says, not what the machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=500

# What cannot run is refused at submission; everything else starts at once, and a dead node is noticed within seconds.
EnforcePartLimits=ALL
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MinJobAge=3600

# Jobs in "urgent" preempt those in "test", which get their signal, ten seconds of grace, and the queue again.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-$nodes] NodeAddr=$network.[1-$nodes] CPUs=$cpus RealMemory=$memory TmpDisk=10000 $gres
PartitionName=test Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
${MINISLURM_CONF:-}
CONF
}

configure() {
  local i
  mkdir -p "$dir"/{state,log,gpu,local}
  chmod 755 "$dir"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  write_hosts >"$dir/hosts"
  write_slurm_conf >"$dir/slurm.conf"
  # Named, so that slurmd does not look for a mounted cgroup; none is used.
  echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"
  for ((i = 0; i < gpus; i++)); do
    mknod "$dir/gpu/$i" c 1 3 # another /dev/null
  done
  if ((gpus > 0)); then
    echo "Name=gpu File=$dir/gpu/[0-$((gpus - 1))]" >"$dir/gres.conf"
  fi
}

# Process 1 of the cluster and its login node. When it dies the kernel ends every daemon and job, and the network.
login_node() {
  local i pid
  read -r pid _ </proc/self/stat # not yet the namespace's /proc, so this is the number seen from outside
  echo "$pid" >"$dir/pid"
  mount -t proc proc /proc
  hostname login
  mount --bind "$dir/hosts" /etc/hosts
  mkdir -p /run/netns
  mount -t tmpfs none /run/netns
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$network.254/24" dev br0
  ip link set br0 up
  munged --force --socket="$dir/munge.sock" --key-file="$dir/munge.key" --pid-file="$dir/munge.pid" \
    --log-file="$dir/log/munge.log" --seed-file="$dir/munge.seed"
  slurmctld -c
  for i in $(seq "$nodes"); do
    connect_node "$i"
    boot_node "node$i"
  done
  wait
  sleep infinity
}

connect_node() { # NUMBER
  ip netns add "node$1"
  ip link add "veth$1" master br0 up type veth peer name eth0 netns "node$1"
  ip -n "node$1" link set lo up
  ip -n "node$1" addr add "$network.$1/24" dev eth0
  ip -n "node$1" link set eth0 up
}

boot_node() { # NODE, called inside
  mkdir -p "$dir/spool-$1"
  setsid ip netns exec "$1" unshare --mount --uts --pid --fork --kill-child --mount-proc "$me" _node "$1" \
    </dev/null >"$dir/log/$1.init" 2>&1 &
  echo $! >"$dir/$1.pid"
}

# Process 1 of a node.
compute_node() { # NODE
  hostname "$1"
  mount -t tmpfs -o size=64m none "$dir/local"
  slurmd -D &
  wait
  sleep infinity
}

idle_nodes() {
  "$me" exec sinfo --noheader --Node --partition=test --states=idle,mixed,allocated --format=%N 2>/dev/null | wc -l
}

start() {
  [ "$(uname)" = Linux ] || fail "needs Linux"
  install_packages >&2
  if ! cluster_pid >/dev/null; then
    rm -rf "$dir"
    configure
    setsid unshare --mount --uts --net --pid --fork "$me" _login </dev/null >"$dir/log/init.log" 2>&1 &
  fi
  for _ in $(seq 300); do
    if [ "$(idle_nodes)" = "$nodes" ]; then return; fi
    if [ -s "$dir/pid" ] && ! cluster_pid >/dev/null; then break; fi
    sleep 0.1
  done
  tail -n 20 "$dir"/log/* >&2
  stop
  fail "did not start; the logs are above"
}

stop() {
  local pid
  if pid=$(cluster_pid); then
    kill -9 "$pid"
    while [ -e "/proc/$pid" ]; do sleep 0.05; done
  fi
  rm -rf "$dir"
}

main() { # a function, so that bash has read the whole file before it runs, and the file may change meanwhile
  local command=${1:-help}
  shift || true
  case $command in
    exec | start | stop | status | crash | boot) [ "$(id -u)" = 0 ] || fail "needs root" ;;
  esac
  case $command in
    start) start ;;
    stop) stop ;;
    exec) inside "$@" ;;
    status) inside sinfo --partition=test --Node --format="%N %T %c %m %G" ;;
    crash) inside kill -9 "$(cat "$dir/$1.pid")" ;;
    boot) inside "$me" _boot "$1" ;;
    _login) login_node ;;
    _boot) boot_node "$1" ;;
    _node) compute_node "$1" ;;
    *)
      sed -n '2,/^set /s/^# \{0,1\}//p' "$me" >&2
      exit 2
      ;;
  esac
}

main "$@"
