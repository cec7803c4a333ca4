# `make demo` and `make test` need python3, make and a package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Hundreds of processes start in the tests: without stored bytecode, each compiles the packages, and pytest every test.
unexport PYTHONDONTWRITEBYTECODE

# The tests that `make test` runs, in parallel. Every other test is slow or needs more than a virtual environment.
QUICK := not slow and not docker and not ray and not conformance and not browser and not gpu
# One process a core; the tests of a file stay together and in order, because they share servers, and the long files of
# tests/integration come first.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-slow test-grids test-containers test-faults test-programs test-browser test-attacks \
  test-all gpu gpu-wheels check check-style check-types check-protos check-files check-docs docs format generate figures lock bench dist clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done  ## Create the virtual environment in .venv, with the versions of constraints.txt.

$(VENV)/.done: pyproject.toml constraints.txt
	@echo 'installing into $(VENV): about 2 GB in a few minutes, with torch for the CPU'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt 'pip>=25.1'  # for --group
	$(BIN)/pip install -q -c constraints.txt -e '.[server,viz,progress,bfloat16,onnx,otel]' --group dev
	@touch $@

demo: setup  ## Start a server and pool a photograph with it; the pictures are written to demo/.
	$(BIN)/python -m scripts.demo

test: setup  ## Run the quick tests, in parallel. ARGS="..." is passed to pytest.
	$(BIN)/pytest $(PARALLEL) -m "$(QUICK)" $(ARGS)

# Large grids, fuzzing and tests of single servers are independent of each other. Containers, faults, programs and a browser
# wait more than they compute, for images, alerts and starts, so two of them share the cores. Calls during an attack are
# compared with those just before it, so two attacks may run at a time, but nothing else.
SLOW := not ($(QUICK))
GRIDS := tests/fuzz tests/integration tests/parity tests/unit
CONTAINERS := tests/docker
FAULTS := tests/deploy/test_faults.py
BROWSER := tests/browser
ATTACKS := tests/attacks

test-slow: setup  ## Run the other tests, in parts. ARGS="..." is passed to pytest.
	@failed=0; \
	$(MAKE) test-grids || failed=1; \
	$(MAKE) -k -j2 --output-sync=target test-containers test-faults test-programs test-browser || failed=1; \
	$(MAKE) test-attacks || failed=1; \
	exit $$failed

test-grids: setup
	$(BIN)/pytest -n auto --maxprocesses 8 -m "$(SLOW)" $(GRIDS) $(ARGS)

test-containers: setup
	$(BIN)/pytest -m "$(SLOW)" $(CONTAINERS) $(ARGS)

test-faults: setup
	$(BIN)/pytest -n 6 -m "$(SLOW)" $(FAULTS) $(ARGS)

test-programs: setup
	$(BIN)/pytest -m "$(SLOW)" $(addprefix --ignore=,$(GRIDS) $(CONTAINERS) $(FAULTS) $(BROWSER) $(ATTACKS)) $(ARGS)

test-browser: setup
	$(BIN)/pytest -m "$(SLOW)" $(BROWSER) $(ARGS)

test-attacks: setup
	$(BIN)/pytest -n 2 -m "$(SLOW)" $(ATTACKS) $(ARGS)

test-all: setup  ## Run every test: the quick ones with coverage, then the others, of which most run in other processes.
	@failed=0; \
	$(MAKE) test ARGS="--cov --cov-report=term" || failed=1; \
	$(MAKE) test-slow || failed=1; \
	exit $$failed

gpu:  ## Run the GPU tests and benchmark with the machine's own python3 and torch; see docs/gpu.md.
	scripts/gpu.sh

# Pure Python, so that they fit any machine. The two packages of gRPC have their lowest versions: they reject an older grpcio.
gpu-wheels:  ## Fill gpu-wheels/ with what scripts/gpu.sh needs on a machine without a network.
	rm -rf gpu-wheels
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: -d gpu-wheels -c constraints.txt structlog ConfigArgParse \
	  prometheus_client h11 googleapis-common-protos pytest pluggy iniconfig packaging pygments pytest-asyncio pytest-timeout sybil
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: -d gpu-wheels grpcio-health-checking==1.75.1 \
	  grpcio-reflection==1.75.1

# `make -j2 check` runs two at a time.
check: check-types check-style check-protos check-files check-docs  ## Run the linters, the type checker and the checks of protos, generated code, vocabulary and docs.

check-style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m scripts.words

check-types: setup
	$(BIN)/mypy
	$(BIN)/mypy tests/typing

check-protos: setup
	$(BIN)/buf lint
	scripts/generate.sh --check

check-files: setup
	$(BIN)/hadolint server/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

check-docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: setup  ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup  ## Format the code and apply the linter's fixes.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate:  ## Generate the Python code of protos/.
	scripts/generate.sh

figures: setup  ## Draw the pictures of the docs again.
	$(BIN)/python -m scripts.figures

lock:  ## Write server/requirements/, the packages of the images with their hashes, after a change of constraints.txt or pyproject.toml.
	scripts/lock.sh

bench: setup  ## Run a benchmark and store its results: make bench NAME=kernels
	$(BIN)/python -m benchmarks $(NAME) --json benchmarks/results/$(NAME).json

dist: setup  ## Build the source distribution and the wheel into dist/.
	$(BIN)/python -m hatchling build --clean -d dist

clean:  ## Remove everything that the other targets create.
	rm -rf .venv .venv-generate .venv-lock .venv-triton .venv-ray .debs demo dist gpu-results gpu-wheels site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
