# `make demo`, `make test` and `make docs` set everything up by themselves; only Python 3.10+ is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test docs reports clean

demo: $(VENV)/.installed
	$(BIN)/rfield demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

# The examples of docs/report.md.
reports: $(VENV)/.installed
	$(BIN)/rfield demo
	$(BIN)/rfield train --config configs/scenes.yaml --paths 4 --out runs/paths
	mkdir -p docs/reports
	cp runs/demo/report.html docs/reports/demo.html
	cp runs/paths/report.html docs/reports/paths.html

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What the tests need on top.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[all,docs]'
	touch $@

clean:
	rm -rf $(VENV) runs build
