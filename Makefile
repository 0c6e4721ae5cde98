# make demo   install into .venv and find objects in the pictures of examples/
# make test   the same environment, all tests
# make lint   formats and types;  make format  puts the formats right
# make bench  operators beside their peers, results in bench/results/
# make core   only the compiled module, in the source tree (for work with PYTHONPATH=python);
#             make core CMAKE_OPTIONS="-DVISIONLLM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real" with CUDA kernels
# make cuda-static   docs/cuda_static.md after a change of a CUDA kernel (needs nvcc, no GPU)
# make gpu-check     on a machine with an NVIDIA GPU: build for it, tests, compute-sanitizer, benches; results in build/gpu_check

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml tests/published.txt CMakeLists.txt constraints.txt $(shell find cmake cpp cuda bindings python -type f -not -name '*.so' -not -path '*/__pycache__/*')
CPP_SOURCES := $(shell find cpp cuda bindings tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTHON_SOURCES := python tests bench
INSTRUCTION ?= The image is: <image>. Detect every object of {"person": <c0>, "cup": <c1>, "cat": <c2>, "sheep": <c3>, "bear": <c4>, "fire": <c5>, "wine glass": <c6>, "cupcake": <c7>}, with offsets within the range 512.

.PHONY: demo test lint format bench core cuda-static gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/visionllm predict examples/ --instruction '$(INSTRUCTION)' --output demo/
	@echo "Annotated pictures are in $(CURDIR)/demo"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(VENV)/.installed-test
	$(BIN)/python bench/ms_deform_attn.py

core: $(BIN)/cmake
	$(BIN)/cmake --preset in-place -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) $(CMAKE_OPTIONS)
	$(BIN)/cmake --build --preset in-place

cuda-static: $(VENV)/.installed-test
	$(BIN)/python bench/cuda_static.py

# Takes whatever python3 has: the machine may have no network, and a torch of its own.
gpu-check:
	PYTHON=$(PYTHON) bench/gpu_check.sh build/gpu_check

clean:
	rm -rf build demo $(VENV)/.installed $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# cmake, ninja and nanobind come with the first installation; after it `make core` compiles and installs nothing.
$(BIN)/cmake:
	$(MAKE) $(VENV)/.installed-test

# The stamps make a second call quick: pip runs again only when a source has changed.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt .
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ".[train,test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/published.txt
	touch $@ $(VENV)/.installed
