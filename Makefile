# Targets: demo test lint mutants chaos bench clean. Each builds .venv on first use.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# One thread per process unless told otherwise; learners set their own. Short spins: docs/threads.md.
export OMP_NUM_THREADS ?= 1
export GOMP_SPINCOUNT ?= 1000
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0
export MPLBACKEND ?= Agg

.PHONY: demo test lint mutants chaos bench clean

demo: $(STAMP)
	$(BIN)/rlhf align --config align/scenes
	@echo "report: runs/scenes/report.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants $(MUTANTS)

chaos: $(STAMP)
	$(BIN)/python -m benchmarks.chaos

bench: $(STAMP)
	$(BIN)/rlhf bench step --config bench/step

clean:
	rm -rf build dist .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
