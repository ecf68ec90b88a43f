# Each target does all of its own set-up, in .venv, on a fresh machine with Python 3.11 or newer.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check bench planted clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11: set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(READY)

setup: $(READY) ## make the virtual environment

demo: $(READY) ## start a disaggregated cluster, stream from it, show what moved
	$(BIN)/baton demo

# What only computes runs on all cores; what starts clusters, or looks at the clock, by itself.
COMPUTING := $(addprefix tests/,bench/simulate bench/report coordinator decode embedded engine \
             exploration kvcache kvtransfer launcher modeling planted prefill protocol ring_attention \
             simulation store test_house_style.py test_state_tables.py test_message_table.py)

test: $(READY) ## the tests that every change runs (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto $(COMPUTING)
	$(BIN)/python -m pytest -m "not slow" $(addprefix --ignore=,$(COMPUTING))

test-all: $(READY) ## all tests
	$(BIN)/python -m pytest --hypothesis-profile=anew

check: $(READY) ## ruff, mypy --strict, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

planted: $(READY) ## plant known bugs and show that each is caught
	$(BIN)/python -m tests.planted.__main__

bench: $(READY) ## the figures of docs/measurements, with machine and versions
	$(BIN)/python -P -m bench --save docs/measurements

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
