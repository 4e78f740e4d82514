# Everything runs in .venv, made here with nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test quality style clean

help:  ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/installed  ## build data, train a tiny model, measure it, write a report (about 4 minutes, no download)
	$(BIN)/m3el-hf quickstart

test: .venv/tested  ## run the tests
	$(BIN)/python -m pytest -n 2

quality: .venv/tested  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/tested  ## fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was installed and made
	rm -rf .venv build dist *.egg-info runs

# torch comes first and pinned: asked for by a range, it would draw in the newest build and its libraries.
.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quality]'
	touch $@
