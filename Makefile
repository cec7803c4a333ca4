# `make demo` and `make test` need python3, make and the registries, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test check docs format generate bench dist clean

help:  ## Say what there is.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.done  ## Make the virtual environment.

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## Start a server and run the main job on a real photograph; pictures go to demo/.
	$(BIN)/python -m scripts.demo

test: setup  ## Run all tests, with coverage.
	$(BIN)/pytest --cov --cov-report=term $(ARGS)

check: setup  ## Lint, format, types, proto, generated code in step, docs that build.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/hadolint server/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	scripts/generate.sh --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: setup  ## Build the site of docs/ into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate:  ## Generate client/poolrpc/v1 from protos/.
	scripts/generate.sh

bench: setup  ## Run a benchmark: make bench NAME=kernels
	$(BIN)/python -m benchmarks $(NAME) --json benchmarks/results/$(NAME).json

dist: setup  ## Build the sdist and the wheel into dist/.
	$(BIN)/python -m hatchling build --clean -d dist

clean:  ## Remove what the others made.
	rm -rf .venv .venv-generate .venv-triton .venv-ray .debs demo dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
