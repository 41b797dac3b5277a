# make demo    warm start, two RL runs, a table and a figure      make test    everything, as CI does
# make check   the quick subset of the tests                       make lint    style          make clean
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that nothing else chooses a torch. For another CUDA: make TORCH="torch==... --index-url ..."
TORCH ?= torch==2.13.0
# Only where torch brought none: its CUDA builds bring the Triton they were built for.
TRITON ?= triton==3.9.0
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test check lint clean install

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m integration.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

check: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
