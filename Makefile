# Everything one does with a checkout. `make` alone prints the targets.
#
# The first target that needs it creates $(VENV) and installs torch and the rest there, once for each content of
# pyproject.toml and of TORCH and EXTRA_REQ; the package is installed in place (editable) and rebuilt when setup.py
# or anything under csrc/ is newer.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
EXTRA_REQ ?=
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?=
BENCH_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

venv := $(abspath $(VENV))
bin := $(venv)/bin
# Checksums in the names of the stamps: another requirement or another environment has no stamp yet.
deps_key := $(shell (cat pyproject.toml; echo '$(TORCH) $(EXTRA_REQ)') | cksum | tr ' ' -)
deps := $(venv)/.bsgap-requirements-$(deps_key)
# One stamp for all environments of this checkout, since they share the libraries built in place.
built := build/.installed-$(shell echo '$(venv)' | cksum | tr ' ' -)
pytest = echo "==> Testing bsgap_kernels on $$($(bin)/python -c 'import platform, torch; print("Python", platform.python_version() + ", torch", torch.__version__)')" && \
	$(bin)/python -m pytest -n auto --dist worksteal --durations=5
sources := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
python_files := $(wildcard bsgap_kernels tests benchmarks tools setup.py)
cpp_files := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo picture test test-all lint format bench build clean

help: ## print this list
	@echo "Targets (each installs what it needs into $(VENV) first; torch is about 5 GB, once):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=\"$(TORCH)\" EXTRA_REQ=\"$(EXTRA_REQ)\""
	@echo "           DEMO_DIR=$(DEMO_DIR) PYTEST_ARGS=\"$(PYTEST_ARGS)\" BENCH_ARGS=\"$(BENCH_ARGS)\""

$(deps): pyproject.toml tools/requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "make: bsgap_kernels needs Python 3.10 or later, and '$(PYTHON)' is none; name one: make PYTHON=python3.12"; exit 1; }
	@$(bin)/python -m pip --version > /dev/null 2>&1 || { \
		echo "==> Creating the virtual environment $(VENV) ($$($(PYTHON) --version))"; \
		$(PYTHON) -m venv $(venv) || \
		{ echo "make: '$(PYTHON) -m venv' failed; on Debian: apt-get install python3-venv"; exit 1; }; }
	@$(bin)/python tools/requirements.py "$(TORCH)" "$(EXTRA_REQ)" > $(venv)/requirements.txt
	@echo "==> Installing $(strip $(TORCH) $(EXTRA_REQ)) and the tools into $(VENV) (once; up to 5 GB and some minutes)"
	@$(bin)/python -m pip install --requirement $(venv)/requirements.txt
	@rm -f $(venv)/.bsgap-requirements-*
	@touch $@

$(built): $(deps) $(sources)
	@echo "==> Compiling csrc/ and installing bsgap_kernels in place (about a minute)"
	@$(bin)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@mkdir -p build && rm -f build/.installed-*
	@touch $@

build: $(built) ## compile csrc/ and install the package in place
	@echo "bsgap_kernels is installed in $(VENV): run $(VENV)/bin/bsgap --help"

demo: $(built) ## train LeNet-5 on digits at three batch sizes, count near-rank at every step, write a report
	@echo "==> Demo: a batch-size sweep with near-rank at every layer and step; replaces $(DEMO_DIR) (under 2 minutes on 2 cores)"
	@$(bin)/bsgap demo --out $(DEMO_DIR) --overwrite

picture: demo ## the README's picture from the demo's report (wants Chromium, chromedriver and an idle machine)
	@$(bin)/python tests/report_picture.py $(DEMO_DIR) docs/report.png

test: $(built) ## run the quick tests on all cores, some minutes
	@$(pytest) -m "not slow" $(PYTEST_ARGS)

test-all: $(built) ## run every test on all cores
	@$(pytest) $(PYTEST_ARGS)

lint: $(deps) ## check format, lint rules and types of Python and C++
	@echo "==> ruff format"; $(bin)/ruff format --check $(python_files)
	@echo "==> ruff check"; $(bin)/ruff check $(python_files)
	@echo "==> mypy (strict, the package)"; $(bin)/mypy
	@echo "==> clang-format ($(words $(cpp_files)) files)"; \
		$(if $(cpp_files),$(bin)/clang-format --dry-run --Werror $(cpp_files))
	@echo "Lint: nothing to complain about."

format: $(deps) ## rewrite Python and C++ in the project's format
	@$(bin)/ruff format $(python_files)
	@$(bin)/ruff check --fix $(python_files)
	@$(if $(cpp_files),$(bin)/clang-format -i $(cpp_files))

bench: $(built) ## time the ops against their peers on each instruction set: benchmarks/results/cpu-*.json, the tables
	@echo "==> Benchmark (wants an idle machine; minutes). A look at less: BENCH_ARGS=\"--quick\", and it is not kept"
	@$(bin)/python -m bsgap_kernels.bench --isa all $(or $(BENCH_ARGS),--json 'benchmarks/results/cpu-{isa}.json')
	@$(if $(BENCH_ARGS),,$(bin)/python benchmarks/readme_table.py)

clean: ## remove what builds and checks left (not the environment, not runs/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find bsgap_kernels -name '*.so' -delete
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Cleaned. The environment stays: rm -r $(VENV) removes it; runs/ holds your results."
