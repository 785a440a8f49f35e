# make check: set everything up and validate the attention kernels (on the reference where there is no GPU).
# make test:  set everything up and run every test that this machine can run.
# PYTHON=python3.12 picks the interpreter (3.10 or newer).

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m

.PHONY: check test lint format wheel clean

check: $(VENV)/installed
	$(VENV)/bin/rawattn check

test: $(VENV)/installed
	$(RUN) pytest

lint: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(VENV)/installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

wheel: $(VENV)/installed
	$(RUN) build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The mark is written last, so that an install which was cut short is done again.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rawattn needs Python 3.10 or newer; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --editable '.[dev]'
	touch $@
