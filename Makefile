# `make demo` and `make test` need python3, make and a package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tests that `make test` runs, in parallel. Every other test is slow or needs more than a virtual environment.
QUICK := not slow and not docker and not ray and not conformance and not browser and not gpu
# One process a core; the tests of a file stay together and in order, because they share servers, and the long files of
# tests/integration come first.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-slow test-all gpu gpu-wheels check docs format generate lock bench dist clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done  ## Create the virtual environment in .venv, with the versions of constraints.txt.

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt 'pip>=25.1'  # for --group
	$(BIN)/pip install -q -c constraints.txt -e '.[server,viz,progress,bfloat16,onnx,otel]' --group dev
	@touch $@

demo: setup  ## Start a server and pool a photograph with it; the pictures are written to demo/.
	$(BIN)/python -m scripts.demo

test: setup  ## Run the quick tests, in parallel. ARGS="..." is passed to pytest.
	$(BIN)/pytest $(PARALLEL) -m "$(QUICK)" $(ARGS)

# Large grids, fuzzing and tests of single servers are independent of each other; what starts containers, Ray, attacks or a
# soak has the machine to itself; the faults mostly wait for their alerts.
GRIDS := tests/fuzz tests/integration tests/parity tests/unit
FAULTS := tests/deploy/test_faults.py

test-slow: setup  ## Run the other tests: grids, fuzzing, servers and faults in parallel, then the rest one after the other. ARGS="..." is for the rest.
	@failed=0; \
	$(BIN)/pytest -n auto --maxprocesses 8 -m "not ($(QUICK))" $(GRIDS) || failed=1; \
	$(BIN)/pytest -n 6 $(FAULTS) || failed=1; \
	$(BIN)/pytest -m "not ($(QUICK))" $(addprefix --ignore=,$(GRIDS) $(FAULTS)) $(ARGS) || failed=1; \
	exit $$failed

test-all: setup  ## Run every test, with coverage: the quick ones in parallel, then the others one after the other.
	@failed=0; \
	$(MAKE) test ARGS="--cov --cov-report= --cov-fail-under=0" || failed=1; \
	$(MAKE) test-slow ARGS="--cov --cov-append --cov-report=term" || failed=1; \
	exit $$failed

gpu:  ## Run the GPU tests and benchmark with the machine's own python3 and torch; see docs/gpu.md.
	scripts/gpu.sh

# Pure Python, so that they fit any machine. The two packages of gRPC have their lowest versions: they reject an older grpcio.
gpu-wheels:  ## Fill gpu-wheels/ with what scripts/gpu.sh needs on a machine without a network.
	rm -rf gpu-wheels
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: -d gpu-wheels -c constraints.txt structlog ConfigArgParse \
	  prometheus_client googleapis-common-protos pytest pluggy iniconfig packaging pygments pytest-asyncio pytest-timeout sybil
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: -d gpu-wheels grpcio-health-checking==1.75.1 \
	  grpcio-reflection==1.75.1

check: setup  ## Run the linters, the type checker and the checks of protos, generated code, vocabulary and docs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/buf lint
	$(BIN)/hadolint server/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	scripts/generate.sh --check
	$(BIN)/python -m scripts.words
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: setup  ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup  ## Format the code and apply the linter's fixes.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate:  ## Generate the Python code of protos/.
	scripts/generate.sh

lock:  ## Write server/requirements/, the packages of the images with their hashes, after a change of constraints.txt or pyproject.toml.
	scripts/lock.sh

bench: setup  ## Run a benchmark and store its results: make bench NAME=kernels
	$(BIN)/python -m benchmarks $(NAME) --json benchmarks/results/$(NAME).json

dist: setup  ## Build the source distribution and the wheel into dist/.
	$(BIN)/python -m hatchling build --clean -d dist

clean:  ## Remove everything that the other targets create.
	rm -rf .venv .venv-generate .venv-lock .venv-triton .venv-ray .debs demo dist gpu-results gpu-wheels site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
