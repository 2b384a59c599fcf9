# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

.PHONY: demo test gpu lint sanitize clean

demo: $(VENV)/.installed
	$(BIN)/vppo demo --out runs/demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# For a machine with a GPU: everything is right first, then timed.
gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks run selection --device cuda
	$(BIN)/python -m benchmarks run divergence --device cuda

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the native library under AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
CXX ?= c++

sanitize: $(VENV)/.installed-test
	CXXFLAGS="-O1 -g -Werror $(SANITIZERS)" VPPO_BUILD_CUDA=0 $(BIN)/python setup.py --quiet build_native \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 VPPO_KERNELS_LIB=$(CURDIR)/$(SANITIZED)/vppo_kernels/lib \
		$(BIN)/python -m pytest -q -k native -p no:cacheprovider tests/vppo_kernels

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
