# `make quickstart` goes from a clone to a model that trained and answered, `make quickstart-vlm` to one that says
# what pictures show; `make test` runs the fast tests; `make docs` writes the documentation to site/.
# The environment is made once: a stamp file says that it fits pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: docs quickstart quickstart-vlm test

quickstart: $(VENV)/.installed
	$(BIN)/torchrun --nproc-per-node 1 core/run.py configs/quickstart.json
	$(BIN)/python docs/examples/quickstart/ask.py

quickstart-vlm: $(VENV)/.installed-media
	$(BIN)/python docs/examples/quickstart_vlm/draw.py
	$(BIN)/torchrun --nproc-per-node 2 core/run.py configs/quickstart_vlm.json
	$(BIN)/python docs/examples/quickstart_vlm/answer.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-media: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[media]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[docs]"
	@touch $(VENV)/.installed $@
