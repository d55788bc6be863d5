# Every target sets up what it needs in $(VENV), on a machine with python3, a C++ compiler and make. Stamp files in it
# make the second run fast; a changed source is compiled again, a changed pyproject.toml installed again.

# Packages are installed while the library compiles.
MAKEFLAGS += --jobs=2

# Python compiles what is imported, once; pip would compile all of torch, which takes longer than to copy it.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
TORCH_OLD ?= 2.11.0
TRITON_OLD ?= 3.6.0
PYTEST_FLAGS ?= -q -n 2 --dist worksteal
BENCH ?= baselines # the extra that the benchmarks install; "bench" leaves out the other packages
BENCH_FLAGS ?=
DEMO_FLAGS ?=
SCIENCE_FLAGS ?=
PLANTED_FLAGS ?=
GPU_CHECK_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile
NATIVE := $(shell find csrc -type f)
CLANG_FORMATTED := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test test-all test-old planted demo science bench gpu-check docs lint format build clean
.DELETE_ON_ERROR:

# Threads that spin while others need the processor take many times as long.
test test-all demo science: export OMP_WAIT_POLICY ?= passive

# What a user's machine has to show.
test: $(VENV)/.with-test $(VENV)/.built
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# And the evidence that no machine of a user changes: tests marked "exhaustive".
test-all: export CACR_TEST_ALL := 1
test-all: test

# What users call, under an old torch in an environment of its own: by hand, it downloads gigabytes. The library is the
# one compiled against $(TORCH), as in a wheel.
test-old: $(VENV)/.built
	test -x $(VENV)-old/bin/python || $(PYTHON) -m venv $(VENV)-old
	$(VENV)-old/bin/python -m pip --disable-pip-version-check install --quiet --no-compile 'torch==$(TORCH_OLD)' \
		'triton==$(TRITON_OLD)' numpy hypothesis pytest pytest-xdist
	$(VENV)-old/bin/python -m pytest $(PYTEST_FLAGS) $(wildcard tests/losses/test_functional*.py) tests/compile tests/operators

# Plants faults in a copy of the tree and says which the tests notice; hours, an interrupted run goes on.
planted: $(VENV)/.with-test $(VENV)/.built
	$(BIN)/python -m tests.planted $(PLANTED_FLAGS)

demo: $(VENV)/.with-demo $(VENV)/.built
	$(BIN)/python -m benchmarks.demo $(DEMO_FLAGS)

# What the loss does to representations, docs/experiment.md: 25 minutes, an interrupted run goes on.
science: $(VENV)/.with-science $(VENV)/.built
	$(BIN)/python -m benchmarks.science $(SCIENCE_FLAGS)

bench: $(VENV)/.with-$(strip $(BENCH)) $(VENV)/.built
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

# The pages, docs/_build/html/index.html; a warning is an error.
docs: $(VENV)/.with-docs $(VENV)/.built
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going -b html docs docs/_build/html

# For the owner of a GPU: a report to attach to an issue. With the Python at hand where that has torch, else with $(VENV).
gpu-check:
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_FLAGS); \
	else $(MAKE) build && $(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK_FLAGS); fi

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=. $(BIN)/mypy tests/package/typed_script.py
	$(if $(CLANG_FORMATTED),$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMATTED))

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CLANG_FORMATTED),$(BIN)/clang-format -i $(CLANG_FORMATTED))

build: $(VENV)/.with-test $(VENV)/.built

clean:
	rm -rf $(VENV) $(VENV)-old build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis cacr_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The package in editable form with the extra named by the stamp; the libraries are compiled beside it.
$(VENV)/.with-%: $(VENV)/.torch-$(TORCH) setup.py pyproject.toml cacr_kernels/_version.py
	CACR_BUILD_CPU=0 CACR_BUILD_CUDA=0 \
		$(INSTALL) --no-build-isolation --editable '.[$*]' 'torch==$(TORCH)'
	touch $@

# The libraries in the source folder, compiled against the torch already installed.
$(VENV)/.built: $(VENV)/.torch-$(TORCH) $(NATIVE) setup.py
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.torch-$(TORCH):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) 'torch==$(TORCH)' numpy 'setuptools>=77' ninja
	rm -f $(VENV)/.torch-* $(VENV)/.with-* $(VENV)/.built
	touch $@
