# Everything a fresh machine needs: Python 3.11 or newer. `make demo` or `make test` sets up .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test faults gpu-check lint clean

setup: $(STAMP)

$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/minimind-dpo demo

test: $(STAMP)
	# the models are tiny: threads would only wait for each other; two tests side by side do not
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

faults: $(STAMP)
	FAULTS_TABLE=docs/reliability.md OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" --numprocesses 2 --dist loadgroup tests/faults

gpu-check: $(STAMP)
	# one GPU, no network, under 8 minutes; docs/gpu.md says how to send what it leaves in runs/gpu_check
	$(BIN)/python -m benchmarks.gpu_check --out runs/gpu_check

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
