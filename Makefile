# `make` lists the targets. They use the environment in .venv and make it when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CAPSRUN := $(BIN)/capsrun
INSTALLED := $(VENV)/.installed
SWEEPS := $(VENV)/.sweeps

# How long the paper's experiments run, and with which seeds (SEEDS="0 1 2"; else those of the budget).
BUDGET ?= short
SEEDS ?=
comma := ,
list = [$(subst $(eval ) ,$(comma),$(strip $(1)))]

.DEFAULT_GOAL := help
.PHONY: help install quickstart reproduce report explorers test test-all audit lint format clean

help: ## list the targets
	@echo "Targets (make TARGET, PYTHON=python3.12 for another Python):"
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  \1\t/' | expand -t 14

install: $(INSTALLED) ## make the environment in .venv, with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "capsrun needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[samples,dev]'
	@touch $@

# What sweeps can run on besides joblib. Hydra's plugin for Ray asks for old versions of packages that
# only its part for AWS uses, so it is installed without them.
$(SWEEPS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[slurm,optuna]' ray
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps hydra-ray-launcher
	@touch $@

quickstart: $(INSTALLED) ## train, test and look into a small CapsNet, on 5,000 real digits (no download, 2 to 5 minutes)
	$(CAPSRUN) train dataset=mnist5k model=capsnet_small recipe.epochs=20 name=quickstart
	$(CAPSRUN) eval dataset=mnist5k checkpoint=runs/quickstart/seed0
	$(CAPSRUN) perturb dataset=mnist5k checkpoint=runs/quickstart/seed0
	$(CAPSRUN) predict docs/five.jpg checkpoint=runs/quickstart/seed0
	$(CAPSRUN) explore dataset=mnist5k checkpoint=runs/quickstart/seed0
	@echo
	@echo "Digits and their reconstructions:  runs/quickstart/seed0/eval-mnist5k-test/pictures/reconstructions.png"
	@echo "What each capsule dimension does:  runs/quickstart/seed0/perturb-mnist5k/pictures/digit_5.png"
	@echo "Draw digits, and move capsules:    runs/quickstart/seed0/explore-mnist5k.html (open it in a browser)"
	@echo "Next, the real thing:              $(CAPSRUN) train dataset=mnist"

TARGETS ?= all
reproduce: $(INSTALLED) ## run the paper's experiments, BUDGET=smoke|short|full; make table1, figures, …: a part
	@$(CAPSRUN) reproduce targets=$(call list,$(TARGETS)) budget=$(BUDGET) $(if $(SEEDS),seeds=$(call list,$(SEEDS))); \
	  code=$$?; [ $$code -gt 1 ] || $(CAPSRUN) report; exit $$code

# Any other target is a group of experiments, or one of them: table1, figures, figure_4. See configs/experiment/.
.DEFAULT:
	@$(MAKE) --no-print-directory reproduce TARGETS=$@

report: $(INSTALLED) ## build the report of the committed results again: results/report/
	$(CAPSRUN) report sources=results out_dir=results/report 'update=[README.md,docs/results.md]'

explorers: $(INSTALLED) ## make the pages in docs/ of the committed checkpoints again
	$(CAPSRUN) explore checkpoint=results/capsnet-mnist.pt out=docs/explorer.html explore.search=10000 explore.mistakes=44
	$(CAPSRUN) explore checkpoint=small out=docs/explorer-draw.html explore.search=10000 explore.mistakes=49
	$(CAPSRUN) explore dataset=multimnist checkpoint=results/capsnet-multimnist-small.pt out=docs/explorer-multimnist.html

# As many tests at once as there are cores, up to four, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(INSTALLED) ## run the tests that need minutes and no GPU
	$(PYTEST)

test-all: $(SWEEPS) ## run every test that this machine can run, the slow ones too
	$(PYTEST) -m "not gpu"

audit: $(INSTALLED) ## check the pinned dependencies for known vulnerabilities (needs the network)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps

lint: $(INSTALLED) ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete the environment and caches, but no data and no runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist
