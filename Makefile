# `make` alone prints the targets. Every target makes .venv first when the lock is newer than it.
PYTHON ?= python3
BIN := .venv/bin
# Their outputs are reports of a moment, kept elsewhere; the pages are stored without.
PAPERMILL_PAGES := nbs/weekly_retrain.ipynb nbs/monitor.ipynb nbs/benchmarks.ipynb
# They show a long run that was done once; each page says how to repeat it.
RECORDED_PAGES := nbs/ablation.ipynb nbs/gate_characteristics.ipynb nbs/monitor_characteristics.ipynb nbs/shadow_characteristics.ipynb nbs/tune.ipynb
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# ARGS is text for a command. Neither make nor a shell expands it: it goes through the environment, is split as a shell
# would split it, and is passed on as words. make itself ends with 2 if a command fails, and prints the command's own code.
override ARGS := $(value ARGS)
export ARGS
define WITH_ARGS
import os, shlex, sys
try:
    words = sys.argv[1:] + shlex.split(os.environ.pop("ARGS", ""))
    os.execvp(words[0], words)
except ValueError as error:
    print(f"ARGS cannot be split into words: {error}", file=sys.stderr)
    sys.exit(2)
endef
export WITH_ARGS
RUN := $(BIN)/python -P -c "$$WITH_ARGS"

.PHONY: help install retrain fetch-production fetch-versions retrain-branch pull-request test test-quick checks export-check lint compiled lab notebooks bench bench-monitor bench-retrain bench-store faults lock clean
.DEFAULT_GOAL := help

help: ## Print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found: call make with PYTHON=/path/to/python3.11."; exit 2; }
	@echo "Making .venv from requirements.lock (once, about a minute) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

install: .venv/.installed ## Make .venv from the lock

retrain: .venv/.installed ## Run the weekly retrain notebook; by default on the sandbox market, for practice
	@$(RUN) $(BIN)/ml-ensemble retrain --set production.allow_simulated=true

fetch-production: ## Fetch the model in production from Git LFS, and no other version
	@git lfs install --local >/dev/null
	@git lfs pull --include "models/production/*"

fetch-versions: ## Fetch the models in production and in the archive from Git LFS
	@git lfs install --local >/dev/null
	@git lfs pull --include "models/production/*,models/archive/*"

# For a protected branch: the weekly workflow publishes on a branch of its own and asks for a merge.
retrain-branch: ## Make a branch for what a retrain publishes, on the remote as well
	@branch="retrain/$$(date -u +%Y-%m-%dT%H%M%S)"; git switch --quiet --create "$$branch"; git push --quiet --set-upstream origin "$$branch"

pull-request: ## Open a pull request for that branch to the default one (GitHub's gh, and GH_TOKEN)
	@gh pr create --fill

export-check: .venv/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/check_export.py

lint: .venv/.installed ## ruff on package, notebooks and tests; mypy on the package
	@$(BIN)/ruff check --quiet ml_ensemble nbs tests
	@$(BIN)/mypy --no-error-summary

# Once, before coverage's tracing makes numba's compiler three times slower; the processes below find it in the cache.
compiled: .venv/.installed
	@$(BIN)/python -c "from ml_ensemble import compiled_trees, indicators; indicators.compiled(); compiled_trees.compiled_loop()"

# Tests run side by side, one process a CPU; each takes about 700 MB.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
test test-quick: export OMP_NUM_THREADS := 1
test test-quick: export OPENBLAS_NUM_THREADS := 1

checks: .venv/.installed
	@$(MAKE) --no-print-directory --jobs=2 export-check lint compiled

test: checks ## Export is fresh; notebooks as nbdev_test runs them and tests side by side; branch coverage
	@$(RUN) $(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term --cov-fail-under=85

test-quick: checks ## The same without notebooks, coverage and what is slow: for the edit loop, below 90 s
	@$(RUN) $(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lab: .venv/.installed ## JupyterLab on the notebooks; ARGS="--port 9000" and the like
	$(RUN) $(BIN)/jupyter lab --notebook-dir nbs $(if $(filter 0,$(shell id -u)),--allow-root) \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url=None

notebooks: .venv/.installed ## Re-execute every notebook in place, then clean
	ML_ENSEMBLE_MODELS=$$(mktemp -d) $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level=WARN $(filter-out $(RECORDED_PAGES),$(wildcard nbs/*.ipynb))
	$(BIN)/jupyter nbconvert --clear-output --inplace --log-level=WARN $(PAPERMILL_PAGES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_clean

PRINT := $(BIN)/python -c 'import json, sys; [print("".join(o["text"]), end="") for c in json.load(sys.stdin)["cells"] for o in c.get("outputs", []) if o.get("name") == "stdout"]'

bench: .venv/.installed ## Speed and memory beside peers, error rates of the gate on a few markets (ARGS="-p bars 200000")
	@folder=$$(mktemp -d); page=$$folder/page.ipynb; trap 'rm -rf $$folder' EXIT; \
	$(RUN) $(BIN)/papermill nbs/benchmarks.ipynb $$page --no-progress-bar --log-level ERROR -p bars 1000000 -p repeats 15 -p rows 3000 \
	  -p batch_rows 1000000 -p markets_count 1000 -p walk_bars 17000 -p trees 0; \
	$(PRINT) < $$page; \
	$(BIN)/papermill nbs/gate_characteristics.ipynb $$page --no-progress-bar --log-level ERROR -p illusions 4 -p planted 4 \
	  -p between 0 -p bars 6600 -p trees 0 -p workers 2; \
	$(PRINT) < $$page
	@$(BIN)/python tests/retrain_budget.py
	@$(BIN)/python tests/prediction_load.py

bench-monitor: .venv/.installed ## What a log of predictions costs a decision, 1,000 a second for a minute, and whether each row arrives in PostgreSQL
	@$(RUN) $(BIN)/python tests/prediction_load.py

bench-retrain: .venv/.installed ## Another part: a retrain of 17,000 bars on one core, seconds and memory of all its processes
	@$(RUN) $(BIN)/python tests/retrain_budget.py

bench-store: .venv/.installed ## Promotions under load beside plain files and MLflow, rollback, a long history (ARGS="--mlflow PYTHON")
	@$(RUN) $(BIN)/python tests/store_load.py

faults: .venv/.installed ## Faults at each step of promotions, rollbacks and backups, signals at random moments, whole retrains killed (12 minutes)
	@$(RUN) $(BIN)/python tests/store_faults.py
	@$(BIN)/python tests/retrain_faults.py

# Left out: libraries for NVIDIA's GPUs, and a checker of web addresses that adds 1.4 s to every import of nbformat.
lock: .venv/.installed ## Resolve requirements.lock anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links \
	  --no-emit-package nvidia-nccl-cu12 --no-emit-package nvidia-nccl-cu13 \
	  --no-emit-package rfc3987-syntax --no-emit-package lark --upgrade --output-file requirements.lock

clean: ## Remove .venv and caches
	rm -rf .venv .coverage* .hypothesis .pytest_cache .mypy_cache .ruff_cache *.egg-info build dist
