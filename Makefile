# `make quickstart` goes from a clone to a model that trained and answered; `make test` runs the fast tests.
# The environment is made once: a stamp file says that it fits pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test

quickstart: $(VENV)/.installed
	$(BIN)/torchrun --nproc-per-node 1 core/run.py configs/quickstart.json
	$(BIN)/python docs/examples/quickstart/ask.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.installed $@
