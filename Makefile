# Everything works in .venv; nothing is installed outside it. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# Options of pip for torch alone, to name another index: TORCH_PIP_ARGS="--index-url URL".
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

# The constraints are for machines without an NVIDIA GPU; a GPU wants the newest torch it can get.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)
PIP := $(PY) -m pip install --disable-pip-version-check --quiet $(CONSTRAINTS)

# An installation is named by what it was made from, so that a change to any of it, and nothing
# else, installs again.
KEY := $(shell cat pyproject.toml constraints-cpu.txt mambench/__init__.py 2>/dev/null | cksum | cut -d' ' -f1)$(if $(HAS_GPU),-gpu,-cpu)
RUN_STAMP := $(VENV)/.installed-$(KEY)
TEST_STAMP := $(VENV)/.installed-test-$(KEY)
DEV_STAMP := $(VENV)/.installed-dev-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help install bench test gate docs screenshots lint format dev clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, TORCH_PIP_ARGS another index for torch,"
	@echo "  PYTEST_ARGS='-k store' what is tested."

install: $(TEST_STAMP) ## make .venv with what the tests need

bench: $(RUN_STAMP) ## sweep the quick suite on this machine and write the report
	@$(PY) run_bench.py run --suite quick

test: $(TEST_STAMP) ## run all tests that need no GPU
	@$(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

gate: $(RUN_STAMP) ## compare performance with the parent commit: kernels compiled, CPU timed
	@.ci/gate $(PY)

docs: $(RUN_STAMP) ## make the figures in the documents from the published runs
	@$(PY) -P mambench/_start.py reports.readme README.md docs/*.md

screenshots: $(TEST_STAMP) ## take the pictures of the published report (needs Chromium)
	@$(PY) -P mambench/_start.py reports.screenshots published/h100-quick docs/images

lint: $(DEV_STAMP) ## check style and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright --pythonpath $(PY)

format: $(DEV_STAMP) ## format, and fix what can be fixed
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

dev: $(DEV_STAMP) ## make .venv with the test and development extras
	@echo "activate it: source $(VENV)/bin/activate"

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch goes first, so that the other index serves it alone.
$(RUN_STAMP): | $(PY)
	@echo "installing (once; torch is large)"
	@$(if $(TORCH_PIP_ARGS),$(PIP) $(TORCH_PIP_ARGS) 'torch>=2.11')
	@$(PIP) -e .
	@rm -f $(VENV)/.installed-*
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	@echo "installing the test extras"
	@$(PIP) -e '.[test]'
	@touch $@

$(DEV_STAMP): $(TEST_STAMP)
	@echo "installing the development extras"
	@$(PIP) -e '.[dev]'
	@touch $@
