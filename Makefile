# `make demo` and `make test` need Python 3.11 to 3.13 and nothing else: the rest goes into .venv, from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SEED ?= 0
MINUTES ?= 10
UV_VERSION := 0.13.9
# Empty: off. Ray and the tests start many processes, each of which would compile its imports again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-thorough test-slow test-faults chaos bench check audit format lock up up-prod down status clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "rcnn needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 ..."; exit 2; }
	@echo "installing into .venv (about a minute, 6 GB: the ordinary build of torch carries CUDA) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	@VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet --require-hashes requirements.lock
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)  ## the whole pipeline on real digits, offline
	@$(BIN)/rcnn pipeline --recipe demo

test: $(READY)  ## the tests, but those that take long
	@$(BIN)/python -m pytest -n 3

test-thorough: $(READY)  ## the tests that cost half a minute each: more kills, workers, networks and servers
	@$(BIN)/python -m pytest -n 3 -m "thorough and not (slow or gpu)"

test-quick: $(READY)  ## the tests that start no server or process, and are quick
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --ignore tests/test_layering.py -m "not (ray or long or thorough or slow or gpu)"

test-slow: $(READY)  ## the tests that take minutes: full MNIST, own images, the local stack, more workers
	@$(BIN)/python -m pytest -m slow --ignore tests/faults

test-faults: $(READY)  ## kills of workers, drivers and nodes, and signals: what training and evaluation must survive
	@$(BIN)/python -m pytest -m slow tests/faults
	@$(BIN)/python -m tests.faults.kills --kills 20

chaos: $(READY)  ## the small pipeline under random faults: make chaos SEED=1 MINUTES=30
	@$(BIN)/python -m tests.faults.chaos --seed $(SEED) --minutes $(MINUTES)

bench: $(READY)  ## speed: each side against its baseline, in one run
	@$(BIN)/python -m tests.bench.data
	@$(BIN)/python -m tests.bench.step
	@$(BIN)/python -m tests.bench.shares
	@$(BIN)/python -m tests.bench.overhead
	@$(BIN)/python -m tests.bench.evaluation

check: $(READY)  ## lint, format, types, and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy rcnn flows infra
	@$(BIN)/python -m pytest tests/test_layering.py

audit: $(READY)  ## insecure code, licences and known vulnerabilities of what is installed: make audit OFFLINE=1 leaves the last out
	@$(BIN)/python -m infra.audit $(if $(OFFLINE),--offline)

format: $(READY)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

lock: $(READY)  ## resolve the dependencies again, for Linux and macOS, Python 3.11 to 3.13
	@$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --all-extras --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --output-file requirements.lock

up: $(READY)  ## start the local stack (Prefect, MLflow, Ray, a worker), or repair it
	@$(BIN)/python -m infra.local.stack up

up-prod: $(READY)  ## the same with PostgreSQL and an S3 store, as on servers: needs `postgres` and `weed`
	@$(BIN)/python -m infra.local.stack up-prod

down: $(READY)  ## stop exactly what `make up` or `make up-prod` started
	@$(BIN)/python -m infra.local.stack down

status: $(READY)  ## each part of the stack: how it is, its address, its last error
	@$(BIN)/python -m infra.local.stack status

clean:  ## remove the environment and caches, but no data
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
