# `make` lists the targets. They use the environment in .venv and make it when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CAPSRUN := $(BIN)/capsrun
INSTALLED := $(VENV)/.installed
SWEEPS := $(VENV)/.sweeps

# How long the paper's experiments run, and with which seeds.
BUDGET ?= short
SEEDS ?= $(shell sed -n 's/^seeds: *//p' configs/budget/$(BUDGET).yaml | tr -d '[],')
GROUPS := table1 multimnist affnist section7 figures ablations
comma := ,

.DEFAULT_GOAL := help
.PHONY: help install quickstart reproduce $(GROUPS) .run report explorers test test-all audit lint \
  format clean

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

quickstart: $(INSTALLED) ## train, evaluate and perturb a CapsNet on 5,000 real digits (no download, 3 to 5 minutes)
	$(CAPSRUN) train dataset=mnist5k recipe.epochs=6 name=quickstart
	$(CAPSRUN) eval dataset=mnist5k checkpoint=runs/quickstart/seed0
	$(CAPSRUN) perturb dataset=mnist5k checkpoint=runs/quickstart/seed0
	@echo
	@echo "Digits and their reconstructions:  runs/quickstart/seed0/eval-mnist5k-test/pictures/reconstructions.png"
	@echo "What each capsule dimension does:  runs/quickstart/seed0/perturb-mnist5k/pictures/digit_5.png"
	@echo "Next, the real thing:              $(CAPSRUN) train dataset=mnist"

# Each experiment with each seed is a file, which is there once it is finished: so what is finished is
# not run again. What an experiment is and to which group it belongs is said in configs/experiment/.
EXPERIMENTS := $(basename $(notdir $(wildcard configs/experiment/*.yaml)))
said = $(shell sed -n 's/^  $(2): *\([^#]*\).*/\1/p' configs/experiment/$(1).yaml | tr -d '[],')
members = $(foreach name,$(EXPERIMENTS),$(if $(filter $(1),$(call said,$(name),group)),$(name)))
# An experiment without a command of its own is done when those that it uses are.
with_command = $(if $(filter null,$(call said,$(1),command)),$(call said,$(1),uses),$(1))
seeds_of = $(if $(filter 1,$(call said,$(1),models)),$(SEEDS),0)
files = $(foreach name,$(1),$(foreach seed,$(call seeds_of,$(name)),runs/$(BUDGET)/$(name)/seed$(seed)/result.json))
results = $(call files,$(foreach name,$(call members,$(1)),$(call with_command,$(name))))
FAILED := runs/$(BUDGET)/.failed
with_commas = $(subst $(eval ) ,$(comma),$(strip $(1)))

reproduce: ## run the paper's experiments, BUDGET=smoke|short|full SEEDS="0 1 2", or a part of them:
reproduce: ## table1, multimnist, affnist, section7, figures, ablations; what is finished is left alone
	@$(MAKE) --no-print-directory .run TARGETS="$(GROUPS)"

$(GROUPS):
	@$(MAKE) --no-print-directory .run TARGETS=$@

.run: $(INSTALLED)
	@$(CAPSRUN) reproduce targets=[$(call with_commas,$(TARGETS))] seeds=[$(call with_commas,$(SEEDS))] \
	  budget=$(BUDGET) only_plan=true
	@rm -f $(FAILED)
	-@$(MAKE) --no-print-directory --keep-going $(foreach group,$(TARGETS),$(call results,$(group)))
	-@$(CAPSRUN) report
	@if [ -e $(FAILED) ]; then echo "failed, the others are done:"; cat $(FAILED); exit 1; fi

# It runs what it needs first, so two at once could meet; `capsrun reproduce parallel=2` knows better.
.NOTPARALLEL:
runs/$(BUDGET)/%/result.json: | $(INSTALLED)
	@$(CAPSRUN) reproduce targets=[$(*D)] seeds=[$(subst seed,,$(*F))] budget=$(BUDGET) timing=false || \
	  { mkdir -p $(dir $(FAILED)); echo "$(*D) seed $(subst seed,,$(*F))" >> $(FAILED); exit 1; }

report: $(INSTALLED) ## build the report of the committed results again: results/report/
	$(CAPSRUN) report sources=[results] out_dir=results/report

explorers: $(INSTALLED) ## make the pages in docs/ of the committed checkpoints again
	$(CAPSRUN) explore checkpoint=results/capsnet-mnist.pt out=docs/explorer.html explore.search=10000 explore.mistakes=44
	$(CAPSRUN) explore checkpoint=results/capsnet-mnist-small.pt out=docs/explorer-draw.html explore.search=10000 explore.mistakes=49
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
