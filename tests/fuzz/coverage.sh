#!/usr/bin/env bash
# Which lines and branches of what reads strangers' bytes the corpora reach: those of the repository, and what
# `make fuzz` has found on this machine. Prints llvm-cov's table.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=build/fuzz-coverage
cmake -S . -B $build -G Ninja -DREDUCER_FUZZ=ON -DREDUCER_FUZZ_COVERAGE=ON -DREDUCER_GRPC=OFF \
  -DCMAKE_CXX_COMPILER="${FUZZ_CXX:-clang++-14}" >/dev/null
objects=()
profiles=()
for source in tests/fuzz/*_fuzz.cc; do
  name=$(basename "$source" .cc)
  ninja -C $build "$name" >/dev/null
  mkdir -p "build/fuzz/found/$name"
  LLVM_PROFILE_FILE=$build/$name.profraw $build/tests/fuzz/"$name" -runs=0 -verbosity=0 \
    "build/fuzz/found/$name" "tests/fuzz/corpus/${name%_fuzz}" 2>$build/"$name".log || { cat $build/"$name".log; exit 1; }
  profiles+=("$build/$name.profraw")
  objects+=(-object "$build/tests/fuzz/$name")
done
llvm-profdata-14 merge -sparse "${profiles[@]}" -o $build/all.profdata
llvm-cov-14 report "${objects[@]:1}" -instr-profile=$build/all.profdata -show-region-summary=false \
  csrc/wire csrc/transport/tcp/inbox.cc csrc/server/session.cc csrc/server/server.cc csrc/server/membership.cc csrc/engine
