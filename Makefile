# Everything runs inside .venv, which `make setup` creates and updates from requirements.lock.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= demo/$(shell date +%Y%m%d-%H%M%S)
STAMP := $(VENV)/.installed
KILLS ?= 20
# Folders of tests that need no S3 server; they take as long as all others that need no cluster.
WITHOUT_STORAGE := $(addprefix tests/,nsnet golden training experiments evaluation report auditing commands isolation)

# Tests start many processes: without bytecode each would compile the modules of this tree again.
unexport PYTHONDONTWRITEBYTECODE

BENCH ?= /tmp/nsnet-bench
.PHONY: bench bench-gpu
.PHONY: setup demo test test-all test-models test-storage test-cluster test-long-faults test-long-rest test-faults fuzz golden check format lock help
.DEFAULT_GOAL := help

help:
	@echo "make setup   install into $(VENV)"
	@echo "make demo    draw images, train, score, evaluate into OUT=$(OUT)"
	@echo "make test    what a change must not break, in 8 minutes: test-models, test-storage and test-cluster, side by side"
	@echo "make test-all   the rest: kills, nights, network faults, runs on S3, real sizes, the demo, a submitted job"
	@echo "make test-faults   KILLS=$(KILLS) times kill -9, of each kind of process in turn; network faults; damaged files"
	@echo "make fuzz    10,500 damaged images, tars, Parquet files and bundles; make test-all runs one minute of them"
	@echo "make golden  recompute tests/golden/*.json: losses and verdicts that only a change of the method may change"
	@echo "make check   ruff, mypy, import rules"
	@echo "make bench   claims of speed on this CPU, each beside its rival; 15 minutes; images in BENCH=$(BENCH)"
	@echo "make bench-gpu   the same on one GPU, 8 minutes; writes $(BENCH)/gpu/gpu.json"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml $(wildcard nsnet/kernels/*)
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/uv --version >/dev/null 2>&1 || $(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) -r requirements.lock
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) --no-deps -e .
	@touch $@

demo: setup
	$(RUN) -m jobs.demo --out $(OUT)

test: setup
	$(RUN) -m tests.support.swift
	$(MAKE) --no-print-directory --jobs 3 test-models test-storage test-cluster

test-models: setup
	$(RUN) -m pytest $(WITHOUT_STORAGE) -m "not long and not cluster" --durations=10

test-storage: setup
	$(RUN) -m pytest $(WITHOUT_STORAGE:%=--ignore=%) -m "not long and not cluster" --durations=10

test-cluster: setup
	$(RUN) -m pytest -m "cluster and not long" --durations=10

test-all: setup
	$(RUN) -m tests.support.swift
	$(MAKE) --no-print-directory --jobs 2 test-long-faults test-long-rest

test-long-faults: setup
	$(RUN) -m pytest -m "long and faults" --durations=10

test-long-rest: setup
	$(RUN) -m pytest -m "long and not faults" --durations=10

# KILLS: number of kills of drivers, actors, workers and nodes; `make test-all` uses two.
test-faults: setup
	$(RUN) -m tests.support.swift
	NSNET_KILLS=$(KILLS) $(RUN) -m pytest -m faults -rA --durations=0

# To repeat one case: python -m tests.fuzz KIND:NUMBER
fuzz: setup
	$(RUN) -m tests.fuzz

# Only after a change that is meant to change the numbers; other changes must not change these files.
golden: setup
	$(RUN) -m tests.golden

# Each script says how it is run alone, and writes benchmarks/results/NAME_MACHINE_DATE.md.
bench: setup
	$(RUN) -m benchmarks.prepare --work $(BENCH)
	$(RUN) -m benchmarks.training_step --work $(BENCH)
	$(RUN) -m benchmarks.captioning --work $(BENCH) --device cpu --size tiny --batch 32 --tokens 8
	$(RUN) -m benchmarks.startup --work $(BENCH)/startup
	$(RUN) -m benchmarks.stream_efficiency --work $(BENCH)/stream --rounds 1

bench-gpu: setup
	$(RUN) -m benchmarks.gpu --work $(BENCH) --out $(BENCH)/gpu

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest tests/test_imports.py

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Pin exact versions for every platform, without an index address in the file.
lock:
	$(VENV)/bin/uv pip compile --quiet --universal --extra dev --no-header --no-annotate --no-emit-index-url \
		--python-version 3.11 -o requirements.lock pyproject.toml
