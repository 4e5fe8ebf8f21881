# `make train` and `make test` are all that a new user needs; each installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help train test test-all test-slow peer browser check schema clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Lumiere needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
	  echo "hint: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ .venv/.installed

# What the slow tests compare with; heavy, and they are skipped without it.
.venv/.installed-transformer-lens: pyproject.toml | .venv/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,transformer-lens]'
	@touch $@

# What opens the report in a browser; the tests that need it are skipped without it.
.venv/.installed-browser: pyproject.toml | .venv/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,browser]'
	@touch $@

train: .venv/.installed  ## trains configs/tiny.yaml (about two minutes on 2 cores), then shows what it can write
	$(BIN)/lumiere train configs/tiny.yaml

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

test: check  ## lint, format and type checks, and the fast tests (under three minutes)
	$(BIN)/pytest -q -n 2 -m "not slow"

test-all: check  ## the same, with the slow tests
	$(BIN)/pytest -q -n 2

peer: .venv/.installed-transformer-lens  ## installs TransformerLens, which slow tests and a benchmark compare with

browser: .venv/.installed-browser  ## installs Playwright, with which slow tests open the report in the system's Chromium
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  echo "error: there is no Chromium"; echo "hint: apt-get install chromium"; exit 2; }

test-slow: .venv/.installed-test
	$(BIN)/pytest -q -n 2 -m slow

schema: .venv/.installed  ## rewrites configs/schema.json, which editors complete from
	$(BIN)/python -m lumiere.config.json_schema configs/schema.json

clean:  ## removes the environment and the caches of the tools (never runs/)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
