# `make serve` and `make test` set up what they need. With a Ray of your own: pip install -e . && serve run configs/quickstart.yaml

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
GPU_PYTHON ?= python3

.PHONY: help serve test lint unit install install-dev clean docs train test-gpu engine-env bench-gateway bench-routing bench-event-plane bench-routing-replay bench-routing-live bench-simulator bench-plan bench-bundles bench-builds bench-latency bench-text bench-transformers bench-workers bench-remote bench-tensor-parallel
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

serve: install  ## run configs/quickstart.yaml (or CONFIG=...) on this machine; Ctrl-C stops it
	$(BIN)/raytrt up $(CONFIG)

test:  ## everything that has to pass: format, lint, types, import rules, tests
	$(MAKE) -j 2 lint engine-env
	$(MAKE) unit

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests start hundreds of processes: they write compiled modules down even where the environment says not to.
unit: install-dev engine-env
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --no-loadscope-reorder

test-gpu:  ## the trtllm engine on GPUs: make test-gpu MODEL=/path GPU_PYTHON=python3 (that TensorRT-LLM is installed for)
	@test -n "$(MODEL)" || { echo "make test-gpu MODEL=/path/to/checkpoint [GPU_PYTHON=/path/to/python]"; exit 2; }
	$(GPU_PYTHON) -m pip install --disable-pip-version-check -r configs/environments/test-gpu.txt
	$(GPU_PYTHON) -m pip install --disable-pip-version-check --no-deps -e .
	$(GPU_PYTHON) -m tests.gpu.smoke $(MODEL)
	RAYTRT_GPU_MODEL=$(MODEL) $(GPU_PYTHON) -m pytest tests/gpu

engine-env: | $(VENV)/bin/python  ## the second Python environment that a test shows: TensorRT-LLM 1.2.1's pins, on a CPU
	$(BIN)/python -m tools.make_engine_env

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

bench-workers: install-dev  ## how soon a worker group notices a failure, and is back
	$(BIN)/python -m benchmarks.workers

bench-remote: install-dev  ## what an engine in a process of its own costs per token
	$(BIN)/python -m benchmarks.remote_engine

bench-tensor-parallel: install-dev  ## the transformers engine on several GPUs of this machine
	$(BIN)/python -m benchmarks.transformers_tensor_parallel

bench-routing: install-dev  ## decisions, events, index and simulator (TRACE=file: what the simulator is timed on)
	$(BIN)/python -m benchmarks.routing $(if $(TRACE),--trace $(TRACE))

bench-event-plane: install-dev  ## what a gateway takes in of the replicas' events
	$(BIN)/python -m benchmarks.event_plane

bench-routing-replay: install-dev  ## every policy on TRACE=file, or on synthetic workloads, in many settings
	$(BIN)/python -m benchmarks.routing_replay $(if $(TRACE),--trace $(TRACE))

bench-routing-live: install-dev  ## prefix-aware routing beside Ray Serve's own routers, on this machine's CPU
	$(BIN)/python -m benchmarks.routing_live

bench-simulator: install-dev  ## the simulator beside a live run of the same requests
	$(BIN)/python -m benchmarks.simulator_validation

bench-plan: install-dev  ## the planner's arithmetic beside published sizes and speeds
	$(BIN)/python -m benchmarks.plan_facts

bench-bundles: install-dev  ## how fast bundles are hashed, published and fetched, beside a plain copy
	$(BIN)/python -m benchmarks.bundle_transfer

bench-builds: install-dev  ## a first build, a second one, and one that was killed
	$(BIN)/python -m benchmarks.builds

bench-gateway: install-dev  ## what gateway and data path cost; output in benchmarks/results
	$(BIN)/python -m benchmarks.gateway

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raytrt needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,build]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,build,dev]'
	touch $@ $(VENV)/.installed

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
