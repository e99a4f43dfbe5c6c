# Everything runs inside .venv, which `make setup` creates and updates from requirements.lock.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= demo/$(shell date +%Y%m%d-%H%M%S)
STAMP := $(VENV)/.installed
KILLS ?= 20
SBOM ?= sbom.json
# Tests on a cluster of nodes from `ray start`.
JOBS := tests/long/test_submit.py
# Folders of tests that need no S3 server; they take as long as all others that need no cluster.
WITHOUT_STORAGE := $(addprefix tests/,nsnet golden training experiments evaluation report auditing commands isolation)

# Tests start many processes: without bytecode each would compile the modules of this tree again.
unexport PYTHONDONTWRITEBYTECODE

BENCH ?= /tmp/nsnet-bench
.PHONY: bench bench-gpu
.PHONY: setup demo test test-all test-models test-storage test-cluster test-long-faults test-long-rest test-faults fuzz golden check format lock audit sbom help
.DEFAULT_GOAL := help

help:
	@echo "make setup   install into $(VENV)"
	@echo "make demo    draw images, train, score, evaluate into OUT=$(OUT)"
	@echo "make test    what a change must not break, in 8 to 11 minutes: test-models, test-storage and test-cluster, side by side"
	@echo "make test-all   the rest: kills, nights, network faults, runs on S3, real sizes, the demo, submitted jobs"
	@echo "make test-faults   KILLS=$(KILLS) times kill -9, of each kind of process in turn; network faults; damaged files"
	@echo "make fuzz    10,500 damaged images, tars, Parquet files and bundles; make test-all runs one minute of them"
	@echo "make golden  recompute tests/golden/*.json: losses and verdicts that only a change of the method may change"
	@echo "make check   ruff, mypy, import rules"
	@echo "make lock    pin versions and hashes of all dependencies"
	@echo "make audit   ask a vulnerability service about every package of requirements.lock"
	@echo "make sbom    write what the container image holds to SBOM=$(SBOM), as CycloneDX"
	@echo "make bench   claims of speed on this CPU, each beside its rival; 15 minutes; images in BENCH=$(BENCH)"
	@echo "make bench-gpu   the same on one GPU, 8 minutes; writes $(BENCH)/gpu/gpu.json"

setup: $(STAMP)

# The hash of uv is compared too, and with --build-constraints the hashes of what builds this package.
$(STAMP): requirements.lock cluster/installer.lock pyproject.toml $(wildcard nsnet/kernels/*)
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r cluster/installer.lock
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) --require-hashes -r requirements.lock
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) --no-deps --build-constraints requirements.lock -e .
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
	$(RUN) -m pytest $(JOBS) --durations=10
	$(RUN) -m pytest -m "long and faults" --durations=10

test-long-rest: setup
	$(RUN) -m pytest --ignore=$(JOBS) -m "long and not faults" --durations=10

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

# Pin exact versions and the hashes of their files for every platform, without an index address in the files.
# requirements.lock holds the tools of `make check` and of the tests too; the container image gets cluster/requirements.lock.
# cluster/installer.lock holds uv, which installs both.
COMPILE := $(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
	--python-version 3.11
lock:
	$(COMPILE) --extra dev -o requirements.lock pyproject.toml
	$(COMPILE) --constraints requirements.lock -o cluster/requirements.lock pyproject.toml
	echo uv | $(COMPILE) -o cluster/installer.lock -

# Exit codes of `python -m tools.audit` (make's own is 2 for any but 0): 0 clean, 1 vulnerable, 3 not audited completely.
audit: setup
	$(RUN) -m tools.audit requirements.lock

sbom: setup
	$(RUN) -m tools.sbom cluster/requirements.lock $(SBOM)
