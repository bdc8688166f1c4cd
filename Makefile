# `make serve` and `make test` set up what they need. With a Ray of your own: pip install -e . && serve run configs/quickstart.yaml

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml

.PHONY: help serve test lint unit install install-dev clean docs train bench-gateway bench-latency bench-text bench-transformers
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

serve: install  ## run configs/quickstart.yaml (or CONFIG=...) on this machine; Ctrl-C stops it
	$(BIN)/raytrt up $(CONFIG)

test: install-dev lint unit  ## everything that has to pass: format, lint, types, import rules, tests

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: install-dev
	$(BIN)/pytest

train: install  ## make the quickstart model again: 12 minutes on two quiet cores
	$(BIN)/python -m training.train

docs: install-dev  ## docs/configuration.md from the configuration models
	$(BIN)/python -m tools.config_reference

bench-latency: install-dev  ## the simulated engine's latency model against published figures
	$(BIN)/python -m benchmarks.latency_model

bench-text: install-dev  ## CPU of the gateway's text layer, alone
	$(BIN)/python -m benchmarks.gateway_text

bench-transformers: install-dev  ## the transformers engine on this machine
	$(BIN)/python -m benchmarks.transformers_engine

bench-gateway: install-dev  ## what gateway and data path cost; output in benchmarks/results
	$(BIN)/python -m benchmarks.gateway

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raytrt needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	touch $@ $(VENV)/.installed

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
