# `make demo` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test fast check format docs clean

demo: $(STAMP)
	$(BIN)/addnorm compare --out demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

# Every operator and constant of the wirings changed in turn: would the tests see it?
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The catalogue pages and the table of findings, out of the classes.
docs: $(STAMP)
	$(BIN)/addnorm wirings --markdown docs/catalogue.md
	$(BIN)/addnorm wirings --markdown docs/catalogue.zh-CN.md --lang zh
	$(BIN)/python runs/findings_table.py

# Installs again only when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "addnorm needs Python 3.11 or newer; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo
