# Two commands on a fresh machine: `make train` and `make test`. Needs Python >= 3.10 with pip, and make.
#   make train ARGS="experiment=cifar10 trainer=gpu"

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
UV := $(shell command -v uv 2>/dev/null || echo .venv/uv/bin/uv)
.DEFAULT_GOAL := help
.PHONY: help train sample test chaos lessons tour lint format types requirements benchmark clean

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(STAMP) ## train (ARGS="experiment=... key=value")
	@$(BIN)/python -m src.train $(ARGS)

sample: $(STAMP) ## draw samples (ARGS="run=outputs/...")
	@$(BIN)/python -m src.sample $(ARGS)

test: $(STAMP) ## run the tests (ARGS="-k name")
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal $(ARGS)

lint: $(STAMP) types ## check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(STAMP)
	@$(BIN)/mypy src

format: $(STAMP) ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

chaos: $(STAMP) ## kill, starve and corrupt runs, and write docs/reliability.md
	@$(BIN)/python -m pytest -v --reliability docs/reliability.md

lessons: $(STAMP) ## run the lessons and write docs/lessons.md (ARGS="--fresh" for new runs)
	@$(BIN)/python -m benchmarks.lessons $(ARGS)

tour: $(STAMP) ## run docs/tour.md and write its pictures and docs/tour.ipynb
	@$(BIN)/python docs/make_tour.py

benchmark: $(STAMP) ## the table of docs/benchmarks.md, side by side with peers (ARGS="--only training")
	@$(BIN)/python -m benchmarks $(ARGS)

requirements: $(STAMP) ## compile requirements.txt from pyproject.toml
	$(UV) pip compile --quiet --universal --all-extras --generate-hashes --no-header --no-annotate \
		--python-version 3.10 pyproject.toml -o requirements.txt

clean: ## remove the environment and the caches, not the outputs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

# The environment is made without pip, and uv comes in a folder of its own, so that a Python whose venv module lacks
# ensurepip (Debian's), or whose pip is old, will do. A broken install leaves no stamp and is repaired by the next call.
# Bytecode is compiled once, here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each command would
# compile torch and Lightning anew, which takes longer than their import.
$(STAMP): requirements.txt requirements-peers.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	@test -x "$(UV)" || $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .venv/uv 'uv>=0.9,<1'
	@$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.txt
	@$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes --no-deps -r requirements-peers.txt
	@touch $(STAMP)
