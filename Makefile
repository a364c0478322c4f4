# Everything a person does here is one word; `make` alone lists the words.

PYTHON  ?= python3
VENV    ?= .venv
RUNS    ?= runs
RESULTS ?= benchmarks/results

IN_VENV := $(VENV)/bin/python -m
# The files that say what to install: when one of them changes, the installation is brought up to date.
PACKAGING := setup.py pyproject.toml spt_fast/_version.py $(wildcard CMakeLists.txt kernels/cpu/* kernels/cuda/*)

# A stamp is written after its step succeeded, so that a step that was interrupted is done again.
VENV_READY  := $(VENV)/.venv-ready
INSTALLED   := $(VENV)/.installed
DEV_READY   := $(VENV)/.installed-dev
BENCH_READY := $(VENV)/.installed-bench
DOCS_READY  := $(VENV)/.installed-docs

# pytest makes the file that regressions compares, but not its folder.
CURRENT         := .benchmarks/current.json
DEVELOPER_SUITE := mkdir -p .benchmarks && $(IN_VENV) pytest benchmarks/test_*.py --quiet --benchmark-json=$(CURRENT)
# Where nothing may be installed: the environment if there is one, else the machine's own Python.
ANY_PYTHON = $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv install demo test docs bench bench-baseline bench-gpu bench-gpu-scale lint format clean

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

venv: $(VENV_READY)  ## create .venv (PYTHON=python3.12 chooses the interpreter)

install: $(INSTALLED)  ## install spt-fast into .venv, editable

demo: $(INSTALLED)  ## SPT against VPT on bundled data, offline: writes runs/demo/report.html
	$(VENV)/bin/spt-fast demo --output $(RUNS)/demo

test: lint  ## lint, then the whole test suite
	$(IN_VENV) pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The variable: no advertisement of another tool among the warnings.
docs: $(DOCS_READY)  ## build the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(IN_VENV) mkdocs build --quiet --strict

# A benchmark that failed does not keep the others from being drawn.
bench: $(BENCH_READY)  ## what became slower, then every benchmark at this machine's sizes, in 10 minutes
	@$(DEVELOPER_SUITE)
	@$(IN_VENV) benchmarks.regressions $(CURRENT)
	@$(IN_VENV) benchmarks.suite --results $(RESULTS); code=$$?; $(IN_VENV) benchmarks.report --results $(abspath $(RESULTS)) && exit $$code

bench-baseline: $(BENCH_READY)  ## what `make bench` compares with from now on
	@$(DEVELOPER_SUITE)
	@$(IN_VENV) benchmarks.regressions $(CURRENT) --replace

bench-gpu:  ## GPU tests and benchmarks on a GPU, in 9 minutes; installs nothing, goes on when called again
	@PYTHONPATH=. $(ANY_PYTHON) -m benchmarks.suite --device cuda --resume --results $(RESULTS)

bench-gpu-scale:  ## training at scale on a GPU, from JPEG files to adapters, in 6 minutes; installs nothing
	@PYTHONPATH=. $(ANY_PYTHON) -m benchmarks.suite --device cuda --resume --at-scale --results $(RESULTS)

lint: $(DEV_READY)  ## ruff (rules and format) and mypy
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

format: $(DEV_READY)  ## put the code into the project's format
	$(IN_VENV) ruff check --fix .
	$(IN_VENV) ruff format .

clean:  ## remove .venv, caches and build leftovers (runs/ stays)
	rm -rf $(VENV) build dist kernels/_native *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_READY):
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "make: there is no '$(PYTHON)'; install Python 3.10 or newer, or name it: make PYTHON=python3.12" >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: spt-fast needs Python 3.10 or newer, '$(PYTHON)' is older; name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "make: '$(PYTHON)' lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(INSTALLED): $(VENV_READY) $(PACKAGING)
	@echo "Installing spt-fast into $(VENV); the first time this downloads PyTorch, a few GB ..."
	@$(IN_VENV) pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV_READY): $(VENV_READY) $(PACKAGING)
	@echo "Installing spt-fast and its development tools into $(VENV); the first time this downloads PyTorch, a few GB ..."
	@$(IN_VENV) pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(INSTALLED) $@

$(BENCH_READY): $(VENV_READY) $(PACKAGING)
	@echo "Installing spt-fast and what it is compared with into $(VENV); the first time this downloads a few GB ..."
	@$(IN_VENV) pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $(INSTALLED) $@

$(DOCS_READY): $(VENV_READY) $(PACKAGING)
	@echo "Installing spt-fast and what builds its documentation into $(VENV); the first time this downloads PyTorch, a few GB ..."
	@$(IN_VENV) pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $(INSTALLED) $@
