# Commands for a machine with Python 3.11 or newer and make. Two of them are enough:
#   make demo      the whole path on the embedded default, with a report at the end
#   make test      style, types and tests
# And for those who work on demerge:
#   make test-all  the slow tests too
#   make coverage  the tests, and which lines they do not run
#   make docs      the documentation in build/docs; a broken link or an undocumented name is an error
#   make bench     the benchmarks at small size

PYTHON ?= python3
DEMO ?= runs/demo
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 --dist worksteal # a process per core, one thread each

.PHONY: help demo test test-all coverage docs bench lint types pytest clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,9s/^# *//p' Makefile

demo: .venv/installed
	$(BIN)/demerge demo -o $(DEMO)
	@echo "The report: $(abspath $(DEMO))/report/index.html"

test: lint types pytest

test-all: lint types
	$(PYTEST) -m 'slow or not slow'

coverage: .venv/installed-dev
	@mkdir -p build/coverage
	$(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage/html

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict
	@echo "The documentation: $(CURDIR)/build/docs/index.html"

bench: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/merge.py --size tiny
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/conflict.py --models digits --repeat 1
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/finetune.py --models digits --repeat 3
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/sample.py --models digits --repeat 3

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed-dev
	@rm -rf build/types && mkdir -p build/types/demerge
	@ln -s "$(CURDIR)"/demerge/* "$(CURDIR)"/analysis "$(CURDIR)"/cli build/types/demerge/
	$(BIN)/mypy -p demerge

pytest: .venv/installed-dev
	$(PYTEST)

clean:
	rm -rf .venv build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv. The first time takes some minutes."
	$(INSTALL) .
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(INSTALL) '.[docs]'
	@touch $@
