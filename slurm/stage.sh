#!/bin/bash
# Shards on the node's own disk: each tar read once, in one go, from the file system that all nodes share, instead of
# every photograph in every epoch. `stage` copies the set to $XCON_STAGE; `slurm/stage.sh remove ARGUMENT ...` removes
# what a job with these arguments copied, unless another job on the node reads it.
#
# A copy is named for the set's card, which has the hashes of all shards. It takes that name when it is whole, and is
# used only if every file is there with its full size. Jobs of a node share it: one at a time copies, under a lock on
# the folder, and each that reads holds a share of the lock beside the copy.
set -euo pipefail

# Sets `copy` to the folder to read from, or to nothing where it cannot be copied.
stage() { # SHARDS
  local copying reading
  copy=
  [ -f "$1/dataset.json" ] || return 0 # what is wrong with it, xcon says better
  copy=$(copy_of "$1")
  mkdir -p "${copy%/*}"
  exec {copying}<"${copy%/*}" {reading}>>"$copy.lock"
  flock "$copying"
  flock --shared "$reading" # kept by the training that this process becomes
  if ! same "$1" "$copy" && ! copy_to "$1" "$copy"; then
    copy=
    exec {reading}>&-
  fi
  exec {copying}<&-
}

copy_to() { # SHARDS COPY
  local have need
  rm -rf "$2" "$2.part"
  need=$(du --summarize --apparent-size --dereference --block-size=1 "$1" | cut -f 1)
  have=$(df --output=avail --block-size=1 "$XCON_STAGE" | tail -n 1)
  if ((need + need / 50 > have)); then # file systems have their own needs
    echo "xcon: $(hostname): not copied, $1 has $((need >> 20)) MB and $XCON_STAGE $((have >> 20)) MB free;" \
      "it is read where it is" >&2
    return 1
  fi
  if ! cp --recursive --dereference "$1" "$2.part"; then
    rm -rf "$2.part"
    echo "xcon: $(hostname): not copied, see above; $1 is read where it is" >&2
    return 1
  fi
  mv "$2.part" "$2"
  echo "xcon: $(hostname): copied $1, $((need >> 20)) MB, to $2"
}

remove() { # SHARDS
  local reading copy
  copy=$(copy_of "$1")
  [ -d "$copy" ] || return 0
  exec {reading}>>"$copy.lock"
  if flock --nonblock "$reading"; then rm -rf "$copy"; fi
}

same() { # SHARDS COPY
  [ -d "$2" ] && [ "$(sizes "$1")" = "$(sizes "$2")" ]
}

sizes() { # FOLDER
  find -L "$1" -type f -printf '%s %P\n' | sort
}

copy_of() { # SHARDS
  local card
  card=$(sha256sum <"$1/dataset.json")
  echo "$XCON_STAGE/xcon-$(id --user)/${card:0:16}"
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

if [ "${1:-}" = remove ]; then
  source slurm/site.sh
  shards=$(shards_of "${@:2}")
  if [ -f "$shards/dataset.json" ]; then remove "$shards"; fi
fi
