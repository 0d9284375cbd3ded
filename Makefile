# The commands that people and CI use; nothing is tested or started in any other way.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/quickstart.yaml
BIN := .venv/bin

.PHONY: help install up down status check test test-unit bench clean

help:
	@echo "make up      install, start Ray here, serve $(CONFIG), answer a first question"
	@echo "make down    stop what 'make up' started"
	@echo "make status  what runs now"
	@echo "make test    every test (unit, contracts, train, ray, e2e)"
	@echo "make check   formatter, linter, types, import contracts"
	@echo "make bench   start times and speed (more: python -m tests.bench)"

# pip runs only when pyproject.toml changed since the last successful install.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Manta needs Python 3.11 or 3.12, but $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

install: .venv/.installed

up: install
	@$(BIN)/manta up $(CONFIG)

down: install
	@$(BIN)/manta down $(CONFIG)

status: install
	@$(BIN)/manta status $(CONFIG)

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-unit: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/unit
	$(BIN)/python -m pytest tests/contracts

# Runs of their own: the last one starts clusters, and must not inherit a process that has loaded half of everything.
test: test-unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train
	$(BIN)/python -m pytest tests/ray tests/e2e

bench: .venv/.installed-dev
	$(BIN)/python -m tests.bench start
	$(BIN)/python -m tests.bench generate

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
