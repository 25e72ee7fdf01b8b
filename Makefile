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
	@echo 'make gpu-check  on a machine with a GPU: test, sanitize and time the CUDA kernels'
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

gpu-check: $(DEPENDENCIES)
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-check: no CUDA device')"
	$(MAKE) $(INSTALLED)
	@$(PY) -m ncpvae.info
	@$(PY) -c "import sys; from ncpvae.ops import _library as l; sys.exit(l.NATIVE_UNAVAILABLE.get('CUDA'))"
	$(PY) -m pytest tests/ops -m cuda
	set -e; if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m pytest tests/ops -m cuda -q; \
	  done; \
	else echo 'gpu-check: compute-sanitizer is not here, memcheck and racecheck are left out'; fi
	$(MAKE) bench

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
