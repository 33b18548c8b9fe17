# Two commands on a fresh machine do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS ?=
# Two idle threads that spin while they wait slow a busy machine down; these sleep.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test check lint bench clean

help:
	@echo "make demo [STEPS=n]  distil a real model on this machine, and open the report"
	@echo "make test            all tests"
	@echo "make check           format, lint, types, floors, budgets, and the quick tests"
	@echo "make bench           speed and memory of the loss, beside the matrix products alone"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	$(BIN)/limbeck demo $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/loss.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
