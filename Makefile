# What a person types. Everything else is in pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# That of `make setup` if it is there: an image with torch needs no environment of ours.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
# As for ranks: some images set it, and float32 products are then rounded.
GPU_ENV := env -u TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
STAMP := $(VENV)/.ready
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.ready
# In the order of the files' names: tests/e2e has the longest, and the shortest of tests/tui come last.
ABREAST := --dist loadfile --no-loadscope-reorder
SELECTED := not slow and not vllm

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all tests-of-ranks other-tests test-faults vllm test-vllm gpu-check lint types \
	docs man site package bench bench-extra gpu-bench starter clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP)  ## .venv with everything in it

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh
	@touch $@

demo: $(STAMP)  ## train the starter model and watch it
	$(BIN)/rlhf-tui demo

test: $(STAMP) lint  ## what every change must pass (under 10 minutes on two cores)
	$(TOGETHER)

test-all: SELECTED := not vllm
test-all: $(STAMP) lint  ## with the whole learning runs
	$(TOGETHER)

# mypy, the tests of ranks and the other tests run at the same time. If one fails, the others go on and make fails.
TOGETHER = @$(MAKE) --no-print-directory -j 3 -k SELECTED="$(SELECTED)" types tests-of-ranks other-tests

# These import torch, which takes ten seconds of processor time for each process of pytest. Their
# output is printed when they have ended, so that only the other tests print dots.
tests-of-ranks: $(STAMP)
	@out=$$(mktemp); $(BIN)/pytest -q -n 2 $(ABREAST) -m "$(SELECTED)" tests/train > $$out 2>&1; \
	code=$$?; echo; echo tests/train:; cat $$out; rm $$out; exit $$code

# These mostly wait for processes.
other-tests: $(STAMP)
	$(BIN)/pytest -q -n 4 $(ABREAST) -m "$(SELECTED)" --ignore=tests/train

vllm: $(VLLM_STAMP)  ## .venv-vllm for rollout.engine=vllm on a CPU (2 minutes, 1.8 GB)

$(VLLM_STAMP): constraints-vllm.txt scripts/install_vllm.sh
	PYTHON="$(PYTHON)" VENV="$(VLLM)" sh scripts/install_vllm.sh
	@touch $@

test-vllm: $(STAMP) $(VLLM_STAMP)  ## what needs vLLM (some minutes)
	$(BIN)/pytest -q -m vllm tests/vllm

test-faults: $(STAMP)  ## break runs in every way there is, and count what is lost (hours)
	$(BIN)/python -m tests.faults

gpu-check:  ## what only a GPU can show; without one, its parts on a pretended one
	$(GPU_ENV) $(GPU_PYTHON) -W ignore -m benchmarks.gpu.check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

package: $(STAMP)  ## build sdist and wheel, check them, and run the demo from an installed wheel
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/check_wheel.sh

docs: man  ## write again what is generated: the pages on keys and metrics, the manual page, recipes
	$(BIN)/python -m scripts.configuration_page
	$(BIN)/python -m scripts.metrics_page
	$(BIN)/python -m scripts.recipe_files

site: $(STAMP)  ## build the documentation site in build/site; every link must hold
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m scripts.site_pages build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # with -q no warning counts

man: $(STAMP)  ## write docs/rlhf-tui.1 again, the manual page
	$(BIN)/python -m scripts.man_page

bench-extra: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'

bench: bench-extra  ## the engine against TRL, and the terminal's budgets (some 10 minutes)
	$(BIN)/python -W ignore -m benchmarks.engine_vs_trl --phases
	$(BIN)/python benchmarks/terminal.py
	$(BIN)/python -m benchmarks.many_runs

gpu-bench:  ## speed on a GPU, and TRL's where it is installed (make bench-extra)
	$(GPU_ENV) $(GPU_PYTHON) -W ignore -m benchmarks.gpu.bench

starter: $(STAMP)  ## build the starter models again (an hour or two)
	$(BIN)/pip install -q -c constraints.txt -e '.[starter]'
	$(BIN)/python -m scripts.build_starter --out engine/starter --work build/starter

clean:  ## remove what the above made, sessions excepted
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
