#!/usr/bin/env bash
# Checks failover.pml with Spin: the protocol of docs/protocol.md in every interleaving of a small job, and that the
# search finds each planted fault. `make model` calls it; minutes, and a GiB of memory.
set -euo pipefail
cd "$(dirname "$0")"

readonly model=$PWD/failover.pml
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# search NAME FLAGS...: prints what Spin says of the search; sets $errors.
search() {
  local name=$1
  shift
  spin -a "$@" "$model" >/dev/null
  gcc -O2 -w -o pan pan.c -DSAFETY -DCOLLAPSE -DMEMLIM=6000
  ./pan -m1000000 >pan.out || true
  errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' pan.out)
  printf '%-40s errors: %s, states: %s, depth: %s\n' "$name" "${errors:-?}" \
    "$(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' pan.out)" \
    "$(sed -n 's/.*depth reached \([0-9]*\).*/\1/p' pan.out)"
  if [ -z "$errors" ] || grep -q 'max search depth too small\|Search not completed\|memory limit' pan.out && [ "$errors" = 0 ]; then
    echo "the search was not completed:"
    cat pan.out
    exit 1
  fi
}

search "2 workers, 2 reducers, 2 pieces, 1 fault" -DPIECES=2 -DFAULTS=1
if [ "$errors" != 0 ]; then
  ./pan -r | tail -100
  exit 1
fi
for fault in NO_KEEPING SETTLE_EARLY WINDOW_STRICT; do
  search "planted: $fault" -DPIECES=3 -DFAULTS=2 -D$fault
  if [ "$errors" = 0 ]; then
    echo "the search did not find the planted fault $fault"
    exit 1
  fi
done
