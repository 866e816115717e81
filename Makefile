# Two commands do everything on a machine with Python 3.11+ and make:
#   make demo   the whole path on the embedded default, with a report at the end
#   make test   style, types and tests

PYTHON ?= python3
DEMO ?= runs/demo
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: help demo test lint types pytest clean
.DELETE_ON_ERROR:

help:
	@sed -n '2,5s/^#  *//p' Makefile

demo: .venv/installed
	$(BIN)/demerge demo -o $(DEMO)
	@echo "The report: $(abspath $(DEMO))/report/index.html"

test: lint types pytest

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed-dev
	@rm -rf build/types && mkdir -p build/types/demerge
	@ln -s "$(CURDIR)"/demerge/* "$(CURDIR)"/analysis "$(CURDIR)"/cli build/types/demerge/
	$(BIN)/mypy -p demerge

pytest: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal # a process per core, one thread each

clean:
	rm -rf .venv build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv, some minutes the first time"
	$(INSTALL) .
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) '.[dev]'
	@touch $@
