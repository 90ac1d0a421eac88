# make bench and make test are all that a newcomer needs; each sets itself up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
# What PyTorch 2.11 brings, the oldest that the package serves.
OLDEST_TRITON := $(VENV)/oldest-triton
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell find csrc tests/csrc tests/fake_gpu \
  -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu')

.PHONY: install test test-baseline fake-gpu on-host test-cpp test-sanitized fuzz mutate bench gpu \
  prebuild docs lint format clean

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements: requirements-dev.txt requirements-peers.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -r requirements-peers.txt
	$(BIN)/pip install -q --no-deps --upgrade --target $(OLDEST_TRITON) triton==3.6.0
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install -q -e .
	touch $@

test: install on-host
	TRT_KERNELS_TEST_TRITON=$(OLDEST_TRITON) $(BIN)/python -m pytest -n auto

# The tests that train, as a processor with neither AVX would compute them.
TRAINING_TESTS = tests/test_penalty_training.py tests/test_distributed.py \
  $(patsubst %,tests/examples/test_train.py::test_%,two_processes_train_as_one backends_agree \
    packed_spikes_train_the_same a_killed_run_resumes_to_the_same_numbers)
test-baseline: install on-host
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default TRT_KERNELS_TEST_LEVEL=baseline \
	  $(BIN)/python -m pytest -n auto $(TRAINING_TESTS)

# Every Triton kernel compiled and launched for three architectures and two Tritons, on a driver that
# computes nothing, then Triton's tests marked gpu on it without their comparisons: twenty minutes.
fake-gpu: install
	TRT_KERNELS_TEST_TRITON=$(OLDEST_TRITON) \
	  $(BIN)/python -m tests.fake_gpu --out benchmarks/results/triton-machine-code.md
	for triton in "" $(OLDEST_TRITON); do \
	  PYTHONPATH=$$triton FAKE_GPU=sm_90 $(BIN)/python -m pytest -n auto -p tests.fake_gpu.plugin \
	    tests/test_gpu.py tests/test_gpu_block.py || exit 1; \
	done

# What the tests compile: for the host, and only what they need.
CONFIGURE_TESTS = $(BIN)/cmake -GNinja -S . -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
  -DTRT_KERNELS_WITH_TESTS=ON -DTRT_KERNELS_ONLY_BASELINE=ON

# The CUDA kernels compiled for the host, as a Python module: the tests of the backend "cuda".
on-host: install
	$(CONFIGURE_TESTS) -B build/on_host -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir)
	$(BIN)/cmake --build build/on_host --target _cuda_on_host

# The mathematics, the core and the CUDA kernels' own source, run by the host: plain, then under
# sanitizers. ThreadSanitizer does not understand OpenMP, so there the core has threads without it.
test-cpp: on-host
	$(BIN)/cmake --build build/on_host --target cpp_tests
	$(BIN)/ctest --test-dir build/on_host --output-on-failure
	for sanitizer in address,undefined thread; do \
	  folder=build/$$sanitizer && \
	  $(CONFIGURE_TESTS) -B $$folder -DTRT_KERNELS_WITH_PYTHON=OFF \
	    -DTRT_KERNELS_SANITIZE=$$sanitizer -DTRT_KERNELS_OPTIMIZE=0 \
	    -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=$$([ $$sanitizer = thread ] && echo ON || echo OFF) && \
	  $(BIN)/cmake --build $$folder && \
	  $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

# The operators' tests in Python, with core and CUDA kernels under AddressSanitizer (which puts red
# zones around torch's tensors too) and UndefinedBehaviorSanitizer.
SANITIZED = build/address,undefined
OPERATOR_TESTS = $(patsubst %,tests/test_%.py,fuzz metamorphic limits lif lif_forms learnable \
  batch_norm_lif loss penalty packing surrogates)
test-sanitized: test-cpp
	$(CONFIGURE_TESTS) -B $(SANITIZED) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir) -DTRT_KERNELS_WITH_PYTHON=ON
	$(BIN)/cmake --build $(SANITIZED) --target _C _cuda_on_host
	TRT_KERNELS_TEST_BUILD=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -n auto -k "not triton and not compile" -m "not slow" $(OPERATOR_TESTS)

# Many more cases of the fuzz tests than `make test` runs, other ones every time: 25 times as many.
FUZZ ?= 25
fuzz: install on-host
	TRT_KERNELS_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n auto tests/test_fuzz.py tests/test_metamorphic.py

# Deliberate faults, one by one in a copy of the tree: each must fail a test. Half an hour; ONLY=name for one.
mutate: $(VENV)/requirements
	TRT_KERNELS_TEST_TRITON=$(abspath $(OLDEST_TRITON)) \
	  $(BIN)/python -m tests.mutations $(if $(ONLY),--only $(ONLY))

bench: install
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks --benchmark-json=$(OUT)/bench.json --benchmark-quiet
	$(BIN)/python -m benchmarks.report $(OUT)/bench.json --out $(OUT)

# On a machine with a GPU, after `pip install --no-build-isolation -e .` there: tests, benchmarks and
# sanitizers, under nine minutes and without a network. STAGES=report,tests,lif,... chooses, SECONDS=
# limits all of it, TRITON=1 times Triton's kernels too, WHEELS= is a folder with the peers' wheels.
# It installs nothing: PYTHON as given, else that of .venv where there is one.
GPU_PYTHON = $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),$(or \
  $(wildcard $(BIN)/python),$(PYTHON)))
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --out $(OUT) $(if $(STAGES),--stages $(STAGES)) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(TRITON),--triton) $(if $(WHEELS),--wheels $(WHEELS))

# The compiled module for another Python, in $(OUT)/prebuilt: FOR=python3.12 ARCHS="90-real;90-virtual".
FOR ?= python3.12
ARCHS ?= 90-real;90-virtual
prebuild: $(VENV)/requirements
	$(BIN)/python -m benchmarks.prebuild --python $(FOR) --archs "$(ARCHS)" --out $(OUT)/prebuilt

# The pages of docs/ as a site in out/docs, which opens from the disk; a warning is an error.
docs: $(VENV)/requirements
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir $(abspath $(OUT))/docs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist out *.egg-info trt_kernels/_C*.so $(VENV)/installed
