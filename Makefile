# make env | demo [VIDEOS=folder] | test | test-slow | chaos | bench | gpu | mlflow | lint
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKSPACE ?= workspace/demo
TEST_WORKERS ?= 2
MLFLOW_PORT ?= 5000
MLFLOW_STORE ?= sqlite:///workspace/mlflow.db
MLFLOW_FILES ?= workspace/mlartifacts

.PHONY: env demo test test-slow chaos bench gpu mlflow lint clean
.DEFAULT_GOAL := help

help:
	@sed -n '1s/^# //p' Makefile

env: $(VENV)/.ready

# The stamp depends on the pins: changing them renews the environment.
$(VENV)/.ready: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned environment into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: env
	@$(BIN)/kinema demo flowfeat workspace=$(WORKSPACE) $(if $(VIDEOS),videos=$(VIDEOS))

test: env
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow and not chaos and not gpu"

test-slow: env
	@$(BIN)/pytest -m slow --timeout 1800

# Ends with a table of the injected faults, also in workspace/chaos.md; more than 45 minutes are a failure. Ray gives its
# workers what other programs leave by default: here they count as much as these.
chaos: env
	@OMP_NUM_THREADS=1 RAY_worker_niceness=0 timeout -s INT 45m $(BIN)/pytest tests/pipelines -n 2 --dist loadfile \
	  -m chaos --timeout 2700 --chaos-table workspace/chaos.md

bench: env
	@$(BIN)/python -m kinema.pipelines.bench

# Needs nothing but python3 with torch, triton, numpy and jaxtyping: OUT=folder MINUTES=9 ONLY=stages WHEELS=folder, with
# wheels of einops (models' steps) and localcorr (a baseline).
gpu:
	@PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m kinema.kernels.gpu \
	  $(if $(OUT),--out $(OUT)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only "$(ONLY)") \
	  $(if $(WHEELS),--wheels $(WHEELS))

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Loopback only; another machine reaches it through `ssh -L 5000:127.0.0.1:5000`, or behind a proxy with a password.
mlflow: env
	@mkdir -p workspace
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --host 127.0.0.1 --port $(MLFLOW_PORT) --workers 1 \
	  --backend-store-uri $(MLFLOW_STORE) --artifacts-destination $(MLFLOW_FILES)

clean:
	rm -rf build dist $(VENV) .pytest_cache .ruff_cache .mypy_cache
