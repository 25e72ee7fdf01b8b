# make test, make demo, …: each sets up what it needs, in .venv, and does nothing twice.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

DEPENDENCIES := $(VENV)/.stamp-dependencies
INSTALLED := $(VENV)/.stamp-installed
EXTRAS := all,test,lint
TREE := csrc python build_support CMakeLists.txt pyproject.toml README.md LICENSE
SOURCES := $(wildcard $(shell git ls-files --cached --others --exclude-standard -- $(TREE) 2>/dev/null \
	|| find $(TREE) -type f -not -name '*.pyc' -not -name '*.so'))

.PHONY: help demo test lint bench gpu-check develop clean

help:
	@echo 'make demo       train a noise contrastive prior on real images and draw from it'
	@echo 'make test       run the tests'
	@echo 'make lint       check style and types'
	@echo 'make bench      time every op against its peers'
	@echo 'make gpu-check  on a machine with a GPU: test, sanitize and time the CUDA kernels, and write one JSON file'
	@echo '                (GPU_PYTHON=python3: with that interpreter as it is, installing nothing)'
	@echo 'make develop    build the kernels in place, for use with PYTHONPATH=python'
	@echo 'make clean      remove what was built'

demo: $(INSTALLED)
	$(PY) -m ncpvae demo

test: $(INSTALLED)
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: $(INSTALLED)
	set -e; for file in $(sort $(wildcard benchmarks/bench_*.py)); do $(PY) $$file; done

# With GPU_PYTHON=<interpreter>, one that has torch, pytest and the package's dependencies already: nothing is installed.
gpu-check: $(if $(GPU_PYTHON),,$(INSTALLED))
	$(if $(GPU_PYTHON),$(GPU_PYTHON) benchmarks/gpu_check.py,$(PY) benchmarks/gpu_check.py --installed)

develop: $(DEPENDENCIES)
	$(PY) -m cmake -G Ninja -S . -B build/develop -DPython_EXECUTABLE=$(abspath $(PY)) -DNCPVAE_INSTALL_DIR=. \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -DCMAKE_INSTALL_PREFIX=$(abspath python/ncpvae)
	$(PY) -m cmake --build build/develop
	$(PY) -m cmake --install build/develop

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(INSTALLED) python/ncpvae/*.so
	find python tests benchmarks build_support -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(DEPENDENCIES): constraints.txt | $(PY)
	$(PY) -m pip install -c constraints.txt torch numpy scikit-build-core pybind11 cmake ninja
	@touch $@

# The build folder is kept, so that a change compiles only what it touches.
$(INSTALLED): $(DEPENDENCIES) $(SOURCES)
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m pip install -c constraints.txt --no-build-isolation \
	  -C build-dir=build/install '.[$(EXTRAS)]'
	@touch $@
