# Everything is run from here, on any machine with Python 3.11 or later, its venv module and make.
# `make help` lists what there is; PYTHON=python3.13 chooses another interpreter for a new .venv.

PYTHON ?= python3
# Three processes for two cores: much of what tests do is to wait for servers and workers.
PYTEST_ARGS ?= -n 3 --dist worksteal
BIN := .venv/bin

# The lock files carry hashes, so pip takes exactly what was locked, from whichever index it is configured to use. They are
# complete, so it resolves nothing (--no-deps): it would look for `pydantic[email]` apart from the locked `pydantic`, find a
# version that came out after the lock, and refuse it for want of a hash.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VENV_REMEDY := "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"
PYTHON_REMEDY := "$(PYTHON) is older than 3.11, or missing; choose another: make PYTHON=python3.11"

# The first two lock files must name the same versions: both are installed into the one .venv.
LOCK := .lock/bin/uv pip compile --quiet --no-config --universal --generate-hashes --python-version 3.11 \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(LOCK_ARGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:  # one pip at a time in .venv
.PHONY: help demo services test chaos lint typecheck bench format lock venv clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/.installed  ## Run the demonstration; needs no server
	@rm -rf .demo && mkdir .demo
	cd .demo && ../$(BIN)/paigeant demo

services: .venv/.installed-dev  ## Show the servers the tests will use; as root on Debian, install what is missing
	$(BIN)/python -m tests.services

test: services .venv-logfire/.installed  ## Run all tests
	$(BIN)/pytest $(PYTEST_ARGS)

chaos: services  ## Kill, cut, wipe and freeze everything for some hours (CHAOS_ARGS="-k redis")
	$(BIN)/pytest -m chaos -s $(CHAOS_ARGS)

lint: .venv/.installed-dev  ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

typecheck: .venv/.installed-dev  ## Check the types
	$(BIN)/mypy $(wildcard src tests benchmarks)

bench: services .bench/venv/.installed  ## Measure, also against peers (BENCH_ARGS="latency --quick")
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

format: .venv/.installed-dev  ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .lock/bin/uv  ## Renew the lock files (LOCK_ARGS=--upgrade for newer versions)
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(LOCK) --extra all pyproject.toml requirements-dev.in -o requirements-dev.txt
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(LOCK) --constraint requirements-dev.txt --no-annotate \
		pyproject.toml requirements.in -o requirements.txt
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(LOCK) --extra otel --no-annotate \
		pyproject.toml tests/requirements-logfire.in -o tests/requirements-logfire.txt

venv: .venv/.installed-dev  ## Make .venv with all that development needs

clean:  ## Remove what make and the tools have made
	rm -rf .venv .venv-logfire .lock .demo .bench dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo $(PYTHON_REMEDY) >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo $(VENV_REMEDY) >&2; exit 1; }
	$(PYTHON) -m venv .venv

# What running Paigeant needs; enough for the demonstration.
.venv/.installed: requirements.txt pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# The same and more, so the smaller set is then installed too.
.venv/.installed-dev: requirements-dev.txt pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@ .venv/.installed

# The peer of the benchmarks, with its own dependencies, stays out of .venv.
.bench/venv/.installed: benchmarks/requirements-peer.txt | .venv/bin/python
	$(BIN)/python -m venv .bench/venv
	.bench/venv/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peer.txt
	@touch $@

# Logfire, for the tests of traces that go there. It adds itself to pytest and to pydantic wherever it is installed, and asks
# for other versions than the rest may have.
.venv-logfire/.installed: private export PIP_PYTHON := .venv-logfire/bin/python
.venv-logfire/.installed: tests/requirements-logfire.txt pyproject.toml | .venv/bin/python
	$(BIN)/python -m venv --clear --without-pip .venv-logfire
	$(PIP_INSTALL) --no-deps --require-hashes -r tests/requirements-logfire.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.lock/bin/uv:
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet --disable-pip-version-check uv
