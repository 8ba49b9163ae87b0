# `make` shows what there is. Every target sets up first what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Each step uses all cores by itself, and figures are measured undisturbed.
.NOTPARALLEL:

JOBS ?= $(or $(MAX_JOBS),$(shell nproc))
VENV := .venv/bin
CLANG_FORMAT ?= clang-format-14
CLANG_TIDY ?= clang-tidy-14
RUN_CLANG_TIDY ?= run-clang-tidy-14
FUZZ_CXX ?= clang++-14
FUZZ_SECONDS ?= 20

SCENARIO ?= all

# The other C++ tests have one thread each, where ThreadSanitizer finds nothing.
THREADED_TESTS := exchange_test conformance_test tcp_test sim_test two_level_test two_level_others_test failover_test recorder_test
space := $(subst ,, )

CPP_FOLDERS := csrc tests/cpp tests/fuzz tests/python/accelerator benchmarks
CPP_FILES = $(shell find $(CPP_FOLDERS) -name '*.cc' -o -name '*.h')

export MAX_JOBS := $(JOBS)

.PHONY: help setup demo netlab perf-check test test-cpp test-asan test-tsan test-model test-python torch-suite test-integrations sim-soak chaos fuzz-smoke fuzz model lint tidy format bench clean

help: ## this table
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20
	@echo
	@echo 'netlab takes SCENARIO, as 8+8 or 8+4,8+0 (default: all); perf-check takes ARGS=--update;'
	@echo 'fuzz-smoke takes FUZZ_SECONDS=$(FUZZ_SECONDS), fuzz FUZZ_EXAMPLES=$(FUZZ_EXAMPLES); test-python and test-integrations take ARGS for pytest;'
	@echo 'sim-soak takes SEEDS, its number of jobs;'
	@echo 'chaos takes ARGS such as "--minutes 1 --seed 7 --verbose";'
	@echo 'torch-suite takes ARGS such as "--backend reducer --world-size 3 -k barrier", or --list.'

setup: ## everything this machine lacks: system packages, .venv, the build (quick if nothing)
	@tools/setup.sh

demo: setup ## train a small GPT through 2 reducers and 4 workers, and beside it on Gloo
	$(VENV)/python examples/demo.py

netlab: setup ## emulated clusters with limited NICs: every algorithm against Gloo, and goals (root; 25 minutes)
	$(VENV)/python benchmarks/netlab.py --scenario $(SCENARIO)

perf-check: setup ## fails where a ratio is more than 15% below benchmarks/baseline.toml (minutes; not a part of test)
	$(VENV)/python benchmarks/perf_check.py $(ARGS)

test: lint test-model test-cpp test-asan test-tsan fuzz-smoke test-python ## everything below down to test-python

lint: setup ## formatters and linters, changing nothing
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)

# The tests share the objects of the build that `setup` made.
test-cpp: setup ## GoogleTest, every layer
	cmake -S . -B build/native -DREDUCER_TESTS=ON >/dev/null
	ninja -C build/native -j $(JOBS) cpp_tests
	ctest --test-dir build/native -j $(JOBS) --output-on-failure --no-tests=error

# Without gRPC: Debian's is not instrumented. The core runs on the simulated transport.
define sanitized
	cmake -S . -B build/$(1) -G Ninja -DREDUCER_TESTS=ON -DREDUCER_GRPC=OFF -DREDUCER_SANITIZE=$(2) >/dev/null
	ninja -C build/$(1) -j $(JOBS) $(3)
	ctest --test-dir build/$(1) -j $(JOBS) --output-on-failure --no-tests=error $(4)
endef

test-asan: export UBSAN_OPTIONS = print_stacktrace=1
# Each takes ten times as long here.
test-asan: export REDUCER_SIM_SEEDS = 300
test-asan: setup ## the core under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call sanitized,asan,address,cpp_tests)

test-tsan: export TSAN_OPTIONS = halt_on_error=1
# The simulated runs of these have one thread, and take minutes here.
test-tsan: export GTEST_FILTER = -Exchange.*:Failover.*
test-tsan: setup ## the core under ThreadSanitizer
	$(call sanitized,tsan,thread,$(THREADED_TESTS),-R '^($(subst $(space),|,$(THREADED_TESTS)))$$')

fuzz-smoke: setup ## libFuzzer on every parser, FUZZ_SECONDS each
	cmake -S . -B build/fuzz -G Ninja -DREDUCER_FUZZ=ON -DREDUCER_GRPC=OFF -DCMAKE_CXX_COMPILER=$(FUZZ_CXX) >/dev/null
	for source in tests/fuzz/*_fuzz.cc; do \
	  name=$$(basename $$source .cc); \
	  ninja -C build/fuzz -j $(JOBS) $$name; \
	  mkdir -p build/fuzz/found/$$name; \
	  build/fuzz/tests/fuzz/$$name -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -verbosity=0 \
	    -artifact_prefix=build/fuzz/ build/fuzz/found/$$name tests/fuzz/corpus/$${name%_fuzz}; \
	done

fuzz: FUZZ_SECONDS = 600
FUZZ_EXAMPLES ?= 20000
fuzz: fuzz-smoke ## the same for half an hour, what it reached, and Hypothesis on Python's parsers, FUZZ_EXAMPLES for each
	tests/fuzz/coverage.sh
	REDUCER_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(VENV)/python -m pytest --timeout 3600 tests/python/test_parsers.py

test-python: setup ## pytest: the backend, the reducers, the command line, as real processes
	$(VENV)/python -m pytest $(ARGS)

# The examples of examples/*_train.py as a user runs them. Has Python packages of its own, so that `setup` needs none of them.
test-integrations: setup ## Lightning, Accelerate and Ray Train on this backend, in .venv-integrations (not a part of test)
	@tools/setup.sh integrations
	.venv-integrations/bin/python -m pytest tests/integrations $(ARGS)

torch-suite: setup ## PyTorch's own distributed suite on reducer, and beside it on Gloo (10 minutes; not a part of test)
	$(VENV)/python tests/torch_suite/report.py $(ARGS)

sim-soak: setup ## failover in 100,000 simulated jobs (SEEDS), and that planted faults are found (15 minutes; a part is in test)
	tests/soak/check.sh

chaos: setup ## reducers are killed, stopped and started again while 4 workers sum (10 minutes; ARGS="--minutes 1")
	$(VENV)/python benchmarks/chaos.py $(ARGS)

test-model: setup ## the protocol of failover, every interleaving of the smallest jobs, by Spin
	tests/model/check.sh quick

model: setup ## the same with larger jobs (minutes; not a part of test)
	tests/model/check.sh

tidy: setup ## clang-tidy on everything that does not include torch (minutes; not a part of test)
	cmake -S . -B build/native >/dev/null
	$(RUN_CLANG_TIDY) -clang-tidy-binary $(CLANG_TIDY) -quiet -j $(JOBS) -p build/native \
	  '/csrc/(common|kernels|wire|recorder|engine|transport|server|collective|simulate|runtime|reducerd)/'

format: setup ## formatters, changing files
	$(VENV)/ruff check --fix-only .
	$(VENV)/ruff format .
	$(CLANG_FORMAT) -i $(CPP_FILES)

bench: setup ## the kernels beside plain loops, then all-reduce on this machine beside Gloo
	cmake -S . -B build/native -DREDUCER_BENCHMARKS=ON >/dev/null
	ninja -C build/native -j $(JOBS) kernels_benchmark
	build/native/benchmarks/kernels_benchmark
	mkdir -p out
	$(VENV)/reducer bench --json out/bench.json --png out/bench.png

clean: ## removes what was built (not .venv, .venv-integrations)
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf reducer/bin reducer/*.so .venv/.native.stamp
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf
