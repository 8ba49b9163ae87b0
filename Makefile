# `make help` lists the targets. `make demo` and `make test` are one command on a fresh clone: they set everything up first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

APT := libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev libhwy-dev libgtest-dev libbenchmark-dev clang-14 \
       libclang-rt-14-dev clang-format clang-tidy ccache ninja-build cmake pkg-config g++ iproute2 python3-venv

WORKERS ?= 8
REDUCERS ?= 8
RATE ?= 1gbit
SIZES ?= 1KiB,64KiB,1MiB,16MiB,64MiB

CXX_FILES := $(shell find csrc tests/cpp tests/fuzz benchmarks -name '*.cc' -o -name '*.h')

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# ---------------------------------------------------------------- set-up

.PHONY: setup apt
setup: apt $(VENV)/.requirements native  ## everything: system packages, .venv, the build (quick if done already)

apt:
	@missing=$$(for p in $(APT); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing: $$missing"; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	fi

$(VENV)/.requirements: requirements-dev.txt
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

# pip builds the native parts with CMake (incrementally) and registers the package's entry points.
.PHONY: native
native: apt $(VENV)/.requirements
	@if [ build/.native -nt pyproject.toml ] && [ build/.native -nt setup.py ] && [ build/.native -nt $(VENV)/.requirements ]; then \
	  cmake --build build/package -j $(JOBS) --target reducer reducer-server reducer_core reducer_torch > build/native.log \
	    || { cat build/native.log; exit 1; }; \
	  cmake --install build/package --prefix . > /dev/null; \
	else \
	  MAX_JOBS=$(JOBS) $(BIN)/pip install -q --no-build-isolation --no-deps -e . && mkdir -p build && touch build/.native; \
	fi

# ---------------------------------------------------------------- try it

.PHONY: demo netlab bench
demo: setup  ## train a small GPT through 2 reduction servers, and on Gloo beside it
	$(BIN)/python examples/demo.py

netlab: setup  ## emulated cluster of 1 Gbit/s hosts (root): WORKERS REDUCERS RATE SIZES
	$(BIN)/python benchmarks/netlab.py --workers $(WORKERS) --reducers $(REDUCERS) --rate $(RATE) --sizes $(SIZES)

bench: setup  ## all-reduce on this machine, beside Gloo
	$(BIN)/reducer bench

# ---------------------------------------------------------------- tests

.PHONY: test test-cpp test-asan test-tsan fuzz-smoke fuzz test-python lint format tidy
test: setup  ## everything that CI runs
	$(MAKE) test-cpp test-asan test-tsan fuzz-smoke lint test-python

test-cpp:  ## C++ tests, one program per layer
	cmake -S . -B build/tests -G Ninja -DREDUCER_TESTS=ON > /dev/null
	cmake --build build/tests -j $(JOBS) --target cpp_tests
	ctest --test-dir build/tests --output-on-failure

# The sanitizers see the core on the simulated network: Debian's gRPC is not instrumented.
test-asan:  ## AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/asan -G Ninja -DREDUCER_TESTS=ON -DREDUCER_GRPC=OFF -DREDUCER_SANITIZE=address > /dev/null
	cmake --build build/asan -j $(JOBS) --target cpp_tests
	ctest --test-dir build/asan --output-on-failure

test-tsan:  ## ThreadSanitizer
	cmake -S . -B build/tsan -G Ninja -DREDUCER_TESTS=ON -DREDUCER_GRPC=OFF -DREDUCER_SANITIZE=thread > /dev/null
	cmake --build build/tsan -j $(JOBS) --target exchange_test conformance_test sim_test
	ctest --test-dir build/tsan --output-on-failure -R 'exchange_test|conformance_test|sim_test'

FUZZ_SECONDS ?= 20
fuzz-smoke:  ## the frame parser under libFuzzer, FUZZ_SECONDS long
	cmake -S . -B build/fuzz -G Ninja -DREDUCER_FUZZ=ON -DREDUCER_GRPC=OFF -DCMAKE_CXX_COMPILER=clang++-14 > /dev/null
	cmake --build build/fuzz -j $(JOBS) --target frame_fuzz
	mkdir -p build/fuzz/corpus
	$$(find build/fuzz -name frame_fuzz -type f) -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -verbosity=0 \
	  build/fuzz/corpus tests/fuzz/corpus/frame

fuzz:  ## the same for half an hour
	$(MAKE) fuzz-smoke FUZZ_SECONDS=1800

test-python:  ## Python tests with real processes and real reducers
	$(BIN)/python -m pytest

lint:  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	clang-format --dry-run -Werror $(CXX_FILES)

format:  ## bring everything into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	clang-format -i $(CXX_FILES)

tidy:  ## clang-tidy over the layers without torch (minutes)
	cmake -S . -B build/tests -G Ninja -DREDUCER_TESTS=ON > /dev/null
	clang-tidy -p build/tests --quiet $(shell find csrc/common csrc/engine csrc/kernels csrc/server csrc/collective csrc/wire -name '*.cc')

.PHONY: clean
clean:  ## remove what was built (not .venv)
	rm -rf build out reducer/*.so reducer/bin
