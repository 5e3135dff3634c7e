# Two commands on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

CLUSTER_VENV ?= .venv-cluster

.PHONY: help quickstart test test-cluster test-cluster-full lint format wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

quickstart: $(VENV)/.train  ## Install, train a small policy by SFT and GRPO, show its curve (SMOKE=1: 2 minutes)
	$(BIN)/atommem quickstart $(if $(SMOKE),--smoke)

test: $(VENV)/.dev  ## Install everything that runs without a GPU, then run all tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-cluster: $(CLUSTER_VENV)/.ready  ## Run the cluster's trainer for real, on a CPU, in a virtual environment of its own
	$(CLUSTER_VENV)/bin/python -m pytest tests/cluster -W default --durations=5

test-cluster-full: $(CLUSTER_VENV)/.ready  ## Also what goes wrong on a cluster, and other ways to train: half an hour
	ATOMMEM_TEST_CLUSTER_FULL=1 $(CLUSTER_VENV)/bin/python -m pytest tests/cluster/test_full.py -W default --durations=0

lint: $(VENV)/.dev  ## Style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.dev  ## Mend the style where a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev  ## Build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## Remove the virtual environment and what was built
	rm -rf $(VENV) $(CLUSTER_VENV) dist build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[train,dev]'
	touch $@ $(VENV)/.train

# torchvision and its like come built for CUDA, and then break the import of transformers.
$(CLUSTER_VENV)/.ready: tests/cluster/requirements.txt
	$(PYTHON) -m venv $(CLUSTER_VENV)
	$(CLUSTER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(CLUSTER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps openrlhf==0.11.2 --editable .
	$(CLUSTER_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
