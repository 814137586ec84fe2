# `make` lists the targets. They use the environment in .venv and make it when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CAPSRUN := $(BIN)/capsrun
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all lint format clean

help: ## list the targets
	@echo "Targets (make TARGET, PYTHON=python3.12 for another Python):"
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  \1\t/' | expand -t 14

install: $(INSTALLED) ## make the environment in .venv, with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "capsrun needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[samples,dev]'
	@touch $@

quickstart: $(INSTALLED) ## train, evaluate and perturb a CapsNet on 5,000 real digits (no download, 3 to 5 minutes)
	$(CAPSRUN) train dataset=mnist5k recipe.epochs=6 name=quickstart
	$(CAPSRUN) eval dataset=mnist5k checkpoint=runs/quickstart/seed0
	$(CAPSRUN) perturb dataset=mnist5k checkpoint=runs/quickstart/seed0
	@echo
	@echo "Digits and their reconstructions:  runs/quickstart/seed0/eval-mnist5k-test/pictures/reconstructions.png"
	@echo "What each capsule dimension does:  runs/quickstart/seed0/perturb-mnist5k/pictures/digit_5.png"
	@echo "Next, the real thing:              $(CAPSRUN) train dataset=mnist"

test: $(INSTALLED) ## run the tests that need minutes and no GPU
	$(BIN)/python -m pytest

test-all: $(INSTALLED) ## run every test that this machine can run, the slow ones too
	$(BIN)/python -m pytest -m "not gpu"

lint: $(INSTALLED) ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete the environment and caches, but no data and no runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist
