# creditmesh. `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
EXTRAS := .venv/.extras
N ?= 200
SECONDS ?= 600

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "creditmesh: Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): set PYTHON=python3.11 or newer"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "creditmesh: this Python can not make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	@echo "creditmesh: installing the locked packages into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-deps -r requirements.lock || { echo "creditmesh: the packages could not be installed; the lines above say why (no network, a full disk, or no wheel for this platform)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(EXTRAS): $(STAMP) requirements.extras.lock
	@echo "creditmesh: installing the extras (milvus, minilm) into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-deps -r requirements.extras.lock || { echo "creditmesh: the extras could not be installed; the lines above say why"; exit 1; }
	@touch $@

setup: $(STAMP) ## install everything into .venv from the lock file

extras: $(EXTRAS) ## install the extras, too: Milvus and MiniLM, which `make test` tries

run: setup ## run the mesh in the foreground, embedded parts only
	@$(BIN)/python -m deploy.local.mesh

run-kafka: setup ## the same with a real Kafka broker between the services
	@$(BIN)/python -m deploy.local.mesh --kafka

test: extras ## run every test, two files at a time, with real PostgreSQL and real Kafka
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: extras ## run the tests that start no process
	@$(BIN)/python -m pytest tests/unit tests/tidy

model: setup ## the ledger beside a model of it, N examples (make model N=2000)
	@SEED=$${SEED:-$$RANDOM}; echo "seed $$SEED: make model N=$(N) SEED=$$SEED"; \
		CREDITMESH_MODEL_EXAMPLES=$(N) $(BIN)/python -m pytest -q tests/integration/test_model.py --hypothesis-seed=$$SEED

torture: setup ## kill services at random under load, N calls (make torture N=2000)
	@$(BIN)/python -m tests.fault.torture --calls $(N)

soak: setup ## calls of every kind for SECONDS, memory and leftovers watched (make soak SECONDS=600)
	@$(BIN)/python -m tests.fault.soak --seconds $(SECONDS)

check: extras ## lint, types, imports, contracts, generated code
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m deploy.contracts

fmt: setup ## sort imports and mend what ruff can
	@$(BIN)/ruff check --fix .

gen: setup ## regenerate gen/ from protos/
	@$(BIN)/python protos/generate.py

bench: extras ## measure, and write benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks

lock: ## resolve requirements.lock again
	@$(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --universal --python-version 3.11 --group dev --group local pyproject.toml -o requirements.lock --custom-compile-command "make lock"
	@$(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --universal --python-version 3.11 --group extras --extra milvus --extra minilm --constraint requirements.lock pyproject.toml -o requirements.extras.lock --custom-compile-command "make lock"

clean: ## remove the virtual environment, caches and the data of `make run`
	@rm -rf .venv .run .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup extras run run-kafka test test-fast model torture soak check fmt gen bench lock clean
