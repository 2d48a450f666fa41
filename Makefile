# Kernel Zoo: `make train` and `make test` need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
ARGS   ?=
JOBS   ?= 2
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-random lint format docs docs-serve clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## create the environment in .venv

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kernel Zoo needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose one with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

train: setup  ## train the default experiment; ARGS="experiment=digits trainer.max_epochs=5" for another
	$(BIN)/python train.py $(ARGS)

test: setup  ## run the tests on two cores; JOBS=8 for more, ARGS="-k golden" for some
	$(PYTEST) $(ARGS)

$(VENV)/.notebooks-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[notebooks]'
	@touch $@

test-slow: $(VENV)/.notebooks-ready  ## run also the tests that train for minutes, the examples and the notebooks
	$(PYTEST) -m "slow or not slow" $(ARGS)

test-random: setup  ## run the tests in random order; ARGS="--randomly-seed=7" repeats one
	$(PYTEST) -p randomly $(ARGS)

lint: setup  ## check style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs-ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs-ready  ## build the documentation site in build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

docs-serve: docs  ## build it and show it at localhost, port 8000
	$(BIN)/python -m http.server --bind localhost --directory build/docs 8000

clean:  ## remove the environment and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
