# Every target does its own set-up: a virtual environment in .venv, made up to date when a dependency changes.
# Another interpreter: make PYTHON=python3.12 setup
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-dist check bench docs constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		f"{sys.executable} is Python {sys.version.split()[0]}: 3.11 or newer is needed; make PYTHON=/path/to/python3.11")'
	@echo "Installing into .venv; this takes a minute or two."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## train a small DeepSeek-V3 on real text in two processes, export it, show the result
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $$($(BIN)/python -c \
		"import torch; print(min(torch.cuda.device_count(), 2) or 2)") train.py experiment=demo run_dir=$(DEMO)
	@$(BIN)/python -m trainer.hf export "$$(ls -d $(DEMO)/checkpoints/step-* | tail -n 1)" $(DEMO)/hf
	@$(BIN)/python -m trainer.report $(DEMO) --exported $(DEMO)/hf

test: $(READY)  ## the tests that CI runs
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-dist: $(READY)  ## the slow tests as well: more processes, kills, resumes
	$(BIN)/python -m pytest -m "not gpu"

check: $(READY)  ## format, lint and types; pre-commit runs this too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## a training step beside transformers, litgpt and torchtitan; an hour or two on two cores
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	$(BIN)/python -m benchmarks.step

docs: $(READY)  ## write the first part of docs/zoo.md anew, from conf/model/
	$(BIN)/python -m zoo --markdown docs/zoo.md

constraints:  ## take the newest versions that pyproject.toml allows (torch stays) into constraints.txt
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet torch==2.13.0 -e '.[dev]'
	{ sed '/^[^#]/d' constraints.txt; build/constraints/bin/python -m pip freeze --all --exclude-editable \
		| grep -v '^pip==' | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove what tools left behind; runs, shards and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
