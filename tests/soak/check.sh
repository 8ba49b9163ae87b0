#!/usr/bin/env bash
# The search for violations of docs/protocol.md in simulated jobs (tests/cpp/failover_soak_test.cc): SEEDS of them, over
# all cores, and then that the search finds each fault of csrc/common/planted.h. `make sim-soak` calls it.
#   SEEDS          how many (default 100,000)
#   PLANTED_SEEDS  after how many a planted fault has to be found (default 20,000)
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly seeds=${SEEDS:-100000} planted_seeds=${PLANTED_SEEDS:-20000} jobs=${MAX_JOBS:-$(nproc)}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# build FOLDER FAULT: the program, with a planted fault or with none (0).
build() {
  cmake -S . -B "$1" -G Ninja -DREDUCER_TESTS=ON -DREDUCER_GRPC=OFF -DREDUCER_PLANTED_FAULT="$2" >/dev/null
  ninja -C "$1" -j "$jobs" failover_soak_test >/dev/null
}

build build/soak 0
pids=()
for ((part = 0; part < jobs; ++part)); do
  REDUCER_SIM_FIRST=$((part * seeds / jobs)) \
    REDUCER_SIM_SEEDS=$(((part + 1) * seeds / jobs - part * seeds / jobs)) \
    build/soak/tests/cpp/failover_soak_test >"$logs/$part" 2>&1 &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
if [ $failed = 1 ]; then
  grep -hA20 Failure "$logs"/* | head -100
  exit 1
fi
grep -h violations "$logs"/*

names=(- 'workers keep nothing that they were answered' 'acknowledgements of older epochs count'
  'a reducer that is back takes part too early')
for fault in 1 2 3; do
  build build/planted $fault
  if REDUCER_SIM_SEEDS=$planted_seeds build/planted/tests/cpp/failover_soak_test >"$logs/planted" 2>&1; then
    echo "planted: ${names[fault]}: not found in $planted_seeds seeds"
    exit 1
  fi
  echo "planted: ${names[fault]}: $(grep -h 'a violation after' "$logs/planted")"
done
