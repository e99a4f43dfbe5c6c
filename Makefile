# Everything runs inside .venv, which `make setup` makes and keeps up to date with requirements.lock.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= demo/$(shell date +%Y%m%d-%H%M%S)
STAMP := $(VENV)/.installed
KILLS ?= 24

.PHONY: setup demo test test-faults test-unit test-rest fuzz golden check format lock help
.DEFAULT_GOAL := help

help:
	@echo "make setup   install into $(VENV)"
	@echo "make demo    draw pictures, train, score, evaluate into OUT=$(OUT)"
	@echo "make test    all tests, in two processes: test-unit, without Ray, S3 and the real sizes; test-rest, with them"
	@echo "make test-faults   kill -9 of everything KILLS=$(KILLS) times, bad networks, poisoned pictures"
	@echo "make fuzz    10,500 damaged images, tars, Parquet files and bundles; a minute of them is in make test"
	@echo "make golden  compute tests/golden/*.json anew: losses and verdicts that only a change of the method may move"
	@echo "make check   ruff, mypy, import rules"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/uv --version >/dev/null 2>&1 || $(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) -r requirements.lock
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps -e .
	@touch $@

demo: setup
	$(RUN) -m jobs.demo --out $(OUT)

test: setup
	$(RUN) -m tests.support.swift
	$(MAKE) --no-print-directory --jobs 2 test-unit test-rest

# KILLS of drivers, actors, workers and nodes; `make test` kills two.
test-faults: setup
	$(RUN) -m tests.support.swift
	NSNET_KILLS=$(KILLS) $(RUN) -m pytest -m faults -rA --durations=0

test-unit: setup
	$(RUN) -m pytest -m "not cluster and not s3 and not real_sizes"

test-rest: setup
	$(RUN) -m pytest -m "cluster or s3 or real_sizes"

# One case again: python -m tests.fuzz KIND:NUMBER
fuzz: setup
	$(RUN) -m tests.fuzz

# After a change that is meant to move the numbers; any other leaves these files as they are.
golden: setup
	$(RUN) -m tests.golden

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest tests/test_imports.py

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Exact versions for every platform; no index address goes into the file.
lock:
	$(VENV)/bin/uv pip compile --quiet --universal --extra dev --no-header --no-annotate --no-emit-index-url \
		--python-version 3.11 -o requirements.lock pyproject.toml
