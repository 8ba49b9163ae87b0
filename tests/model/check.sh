#!/usr/bin/env bash
# Checks the models of docs/protocol.md with Spin, every interleaving of a small job each, and that the search finds
# each planted fault. `check.sh quick` takes half a minute (`make test-model`), without an argument it takes minutes and
# a GiB of memory (`make model`).
set -euo pipefail
cd "$(dirname "$0")"

readonly models=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# search NAME MODEL FLAGS...: prints what Spin says of the search; sets $errors.
search() {
  local name=$1 model=$models/$2
  shift 2
  spin -a "$@" "$model" >/dev/null
  gcc -O2 -w -o pan pan.c -DSAFETY -DCOLLAPSE -DMEMLIM=6000
  ./pan -m1000000 >pan.out || true
  errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' pan.out)
  printf '%-58s errors: %s, states: %s, depth: %s\n' "$name" "${errors:-?}" \
    "$(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' pan.out)" \
    "$(sed -n 's/.*depth reached \([0-9]*\).*/\1/p' pan.out)"
  if [ -z "$errors" ] || grep -q 'max search depth too small\|Search not completed\|memory limit' pan.out && [ "$errors" = 0 ]; then
    echo "the search was not completed:"
    cat pan.out
    exit 1
  fi
}

sound() {
  search "$@"
  [ "$errors" = 0 ] && return
  ./pan -r | tail -100
  exit 1
}

planted() {
  local fault=$1
  shift
  search "planted: $fault" "$@" "-D$fault"
  [ "$errors" != 0 ] && return
  echo "the search did not find the planted fault $fault"
  exit 1
}

sound '1 piece of 2 workers at 2 reducers, 1 fault' failover.pml -DPIECES=1 -DFAULTS=1
if [ "${1-}" != quick ]; then
  sound '2 pieces of 2 workers at 2 reducers, 1 fault' failover.pml -DPIECES=2 -DFAULTS=1
fi
planted NO_KEEPING failover.pml -DPIECES=1 -DFAULTS=1
planted SETTLE_EARLY failover.pml -DPIECES=1 -DFAULTS=1
planted WINDOW_STRICT failover.pml -DPIECES=2 -DFAULTS=1

sound 'return: 2 workers, 3 calls, 2 attempts, 1 loss' comeback.pml
if [ "${1-}" != quick ]; then
  sound 'return: 3 workers, 2 calls, 1 attempt, 1 loss' comeback.pml -DWORKERS=3 -DCALLS=2 -DATTEMPTS=1
  sound 'return: 2 workers, 2 calls, 3 attempts, 2 losses' comeback.pml -DCALLS=2 -DATTEMPTS=3 -DLOSSES=2
fi
for fault in EARLY NO_HOLD NO_RELEASE; do
  planted $fault comeback.pml
done
