# What a person types. Everything else is in pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# A GPU box may have PyTorch and no network: then its own Python runs what needs a GPU.
GPU_PYTHON = $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))
# Files of tests at a time: most of what they do is wait for processes.
ABREAST := -n 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-faults gpu-check lint types docs bench bench-extra gpu-bench starter clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP)  ## .venv with everything in it

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh
	@touch $@

demo: $(STAMP)  ## train the starter model and watch it
	$(BIN)/rlhf-tui demo

test: $(STAMP) lint types  ## what every change must pass (under 10 minutes on two cores)
	$(BIN)/pytest -q $(ABREAST) -m "not slow"

test-all: $(STAMP) lint types  ## with the whole learning runs
	$(BIN)/pytest -q $(ABREAST)

test-faults: $(STAMP)  ## break runs in every way there is, and count what is lost (hours)
	$(BIN)/python -m tests.faults

gpu-check:  ## what only a GPU can show; without one, its parts on a pretended one
	$(GPU_PYTHON) -W ignore -m benchmarks.gpu.check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)  ## write docs/configuration.md and docs/metrics.md again
	$(BIN)/python -m scripts.configuration_page
	$(BIN)/python -m scripts.metrics_page

bench-extra: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'

bench: bench-extra  ## the engine against TRL, and the terminal's budgets (some 10 minutes)
	$(BIN)/python -W ignore -m benchmarks.engine_vs_trl --phases
	$(BIN)/python benchmarks/terminal.py

gpu-bench:  ## speed on a GPU, and TRL's where it is installed (make bench-extra)
	$(GPU_PYTHON) -W ignore -m benchmarks.gpu.bench

starter: $(STAMP)  ## build the starter models again (an hour or two)
	$(BIN)/pip install -q -c constraints.txt -e '.[starter]'
	$(BIN)/python -m scripts.build_starter --out engine/starter --work build/starter

clean:  ## remove what the above made, sessions excepted
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
