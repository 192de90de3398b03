# Two commands do everything on a machine with Python 3.11, make and git:
#   make pretrain   set up .venv, and train a small ESM-1nv on the shipped sample
#   make test       set up .venv, and check style, types and behaviour
# `make bench` measures side by side with what people use, on a machine that has nothing else to do.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: pretrain test bench lint format clean

pretrain: .venv/.ready
	@$(BIN)/python examples/pretrain_esm1nv.py recipe=laptop

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

bench: .venv/.ready
	@$(BIN)/python -m benchmarks

lint: .venv/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: .venv/.ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch is named with its version, so that pip does not choose a newer build with gigabytes of CUDA libraries.
.venv/.ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; a few minutes, about 2 GB) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable '.[test]'
	@touch $@
