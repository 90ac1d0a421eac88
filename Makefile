# make bench and make test are all that a newcomer needs; each sets itself up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: install test test-cpp bench lint format clean

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements: requirements-dev.txt requirements-peers.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -r requirements-peers.txt
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install -q -e .
	touch $@

test: install
	$(BIN)/python -m pytest -n auto

# The mathematics and the CUDA kernels' own source, run by the host: plain, then under sanitizers.
test-cpp: install
	for sanitizer in "" address,undefined thread; do \
	  folder=build/cpp-$${sanitizer:-plain} && \
	  $(BIN)/cmake -GNinja -S . -B $$folder -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DTRT_KERNELS_WITH_PYTHON=OFF -DTRT_KERNELS_WITH_TESTS=ON \
	    -DTRT_KERNELS_SANITIZE=$$sanitizer && \
	  $(BIN)/cmake --build $$folder && \
	  $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

bench: install
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks --benchmark-json=$(OUT)/bench.json --benchmark-quiet
	$(BIN)/python -m benchmarks.report $(OUT)/bench.json --out $(OUT)

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
