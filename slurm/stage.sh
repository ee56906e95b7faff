#!/bin/bash
# Shards on the node's own disk: each tar read once, in one go, from the file system that all nodes share, instead of
# every photograph in every epoch. ARGUMENT ... are those of a job:
#   slurm/stage.sh copy ARGUMENT ...      copies its set to $XCON_STAGE, on each node, before anything is started there
#   slurm/stage.sh remove ARGUMENT ...    removes the copy, unless another job on the node reads it
#
# A copy is named for the set's card, which has the hashes of all shards. It takes that name when it is whole, and is
# used only if every file that the card names is there with its full size. Jobs of a node share it: one at a time
# copies or removes, under a lock on the folder, and each that reads holds a share of the lock beside the copy.
set -euo pipefail

# Makes the copy, where there is none that is whole.
stage() { # SHARDS
  local copying reading copy
  copy=$(copy_of "$1")
  mkdir -p "${copy%/*}"
  exec {copying}<"${copy%/*}" {reading}>>"$copy.lock"
  flock "$copying"
  if same "$1" "$copy"; then return; fi
  if ! flock --nonblock "$reading"; then
    echo "xcon: $(hostname): not copied, another job reads a copy that is no longer whole; $1 is read where it is" >&2
    return
  fi
  copy_to "$1" "$copy"
}

# Sets `copy` to the folder to read from, kept as long as this process and what it becomes, or to nothing.
use() { # SHARDS
  local reading
  copy=$(copy_of "$1")
  if [ -e "$copy.lock" ]; then
    exec {reading}>>"$copy.lock"
    if flock --shared --nonblock "$reading" && same "$1" "$copy"; then return; fi
    exec {reading}>&-
  fi
  copy=
}

copy_to() { # SHARDS COPY
  local have need=0 bytes _
  rm -rf "$2" "$2.part"
  while read -r bytes _; do need=$((need + bytes)); done < <(files "$1")
  have=$(free_bytes)
  if ((need + need / 50 > have)); then # file systems have their own needs
    remove_unused
    have=$(free_bytes)
  fi
  if ((need + need / 50 > have)); then
    echo "xcon: $(hostname): not copied, $1 has $((need >> 20)) MB and $XCON_STAGE $((have >> 20)) MB free;" \
      "it is read where it is" >&2
    return
  fi
  mkdir "$2.part"
  if ! (cd "$1" && files . | cut -d ' ' -f 2- | xargs -d '\n' cp --dereference --parents --target-directory "$2.part"); then
    rm -rf "$2.part"
    echo "xcon: $(hostname): not copied, see above; $1 is read where it is" >&2
    return
  fi
  mv "$2.part" "$2"
  echo "xcon: $(hostname): copied $1, $((need >> 20)) MB, to $2"
}

free_bytes() {
  df --output=avail --block-size=1 "$XCON_STAGE" | tail -n 1
}

# Removes this user's copies that no job reads; called under the lock on the folder.
remove_unused() {
  local lock
  for lock in "$(folder)"/*.lock; do remove_copy "${lock%.lock}"; done
}

# Removes a copy, unless a job reads or makes it; that another is being made is no reason to wait.
remove() { # SHARDS
  local copying
  [ -d "$(folder)" ] || return 0
  exec {copying}<"$(folder)"
  if flock --nonblock "$copying"; then remove_copy "$(copy_of "$1")"; fi
}

remove_copy() { # COPY
  local reading
  exec {reading}>>"$1.lock"
  if flock --nonblock "$reading"; then rm -rf "$1" "$1.part"; fi
  exec {reading}>&-
}

same() { # SHARDS COPY
  [ -d "$2" ] && [ "$(files "$1")" = "$(files "$2")" ]
}

# Size and name of the card, of the tars that it names and of their indices, as far as they are there: what is wrong
# with a set, xcon says better. Other files in the folder matter to nobody.
files() { # SHARDS
  (cd "$1" && { echo dataset.json && tars; } | xargs -d '\n' stat --dereference --format '%s %n' 2>/dev/null | sort) || true
}

tars() {
  grep -oE '"file": *"[^"]+\.tar"' dataset.json | cut -d '"' -f 4 | sed -E 'p; s/\.tar$/.index.parquet/'
}

folder() {
  echo "$XCON_STAGE/xcon-$(id --user)"
}

copy_of() { # SHARDS
  local card
  card=$(sha256sum <"$1/dataset.json")
  echo "$(folder)/${card:0:16}"
}

# The folder that --shards names, the last one if there are several.
shards_of() { # ARGUMENT ...
  local found=
  while (($#)); do
    case $1 in
      --shards) found=${2:-} ;;
      --shards=*) found=${1#*=} ;;
    esac
    shift
  done
  echo "$found"
}

if [ "${1:-}" = copy ] || [ "${1:-}" = remove ]; then
  source slurm/site.sh
  # A signal ends what is running here, and the copy; the file says why, and the job does not begin.
  if [ "$1" = copy ]; then trap ': >"$XCON_ASKED"' TERM USR1; fi
  shards=$(shards_of "${@:2}")
  if [ ! -f "$shards/dataset.json" ]; then exit; fi
  if [ "$1" = copy ]; then stage "$shards"; else remove "$shards"; fi
fi
