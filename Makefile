# Everything a checkout can do, in a virtual environment of its own. Needs python3 (3.11 or newer) and a C++ compiler.
# `make help` prints the text behind ## of each target, and the lines that begin with ##. No path is used unquoted: folders may
# have spaces in their names.
##
## ILLADA_CUDA=on|off    build the CUDA kernels or not; default: where this environment's torch finds a GPU. Remembered.
## VENV=DIR              the virtual environment; default .venv. VENV_CUDA=DIR: one with a CUDA build of torch (5.5 GB)
## ARGS="-k remask"      goes to pytest in test-build, test-cuda and fuzz
## CUSIM=DIR             the folder of a simulator, for test-cuda without a GPU, predict and dry-run
## MODES=lazy            test-cuda: one of the simulator's two modes; DEVICE=a100 and CHECKS= are its options
## UPDATE=1              ptxas: write the budget; EXAMPLES=N: fuzz; ONLY=backward: predict some cases and keep the others

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VENV_CUDA ?= .venv-cuda
BIN_CUDA := $(VENV_CUDA)/bin
# The headers of CUTLASS for builds in a checkout, pinned. `pip install .` alone finds or fetches its own.
CUTLASS_VERSION := 4.2.0.0
CUTLASS := .cache/cutlass-$(CUTLASS_VERSION)
NVCC := $(shell PATH="$$PATH:$(or $(CUDA_PATH),/nowhere)/bin" command -v "$(or $(firstword $(CUDACXX)),nvcc)" 2>/dev/null)
# To be fetched: where there is an nvcc for CMake to find, and ILLADA_CUTLASS_DIR names no others. A make that a rule calls
# has it from here.
ifeq ($(subst $(CURDIR)/$(CUTLASS),,$(ILLADA_CUTLASS_DIR)),)
HEADERS := $(if $(filter off OFF Off,$(ILLADA_CUDA)),,$(if $(NVCC),$(CUTLASS)))
ifneq ($(HEADERS),)
export ILLADA_CUTLASS_DIR := $(CURDIR)/$(CUTLASS)
endif
endif
FETCH = $(if $(HEADERS),$(MAKE) --no-print-directory "$(CUTLASS)" || exit 1,:)
EXAMPLES ?= 20000
MODES ?= eager lazy
CHECKS ?= race,proxy
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Sources of the installed package: it is built again when one of them changes.
SOURCES := $(shell find build_backend csrc cmake python -type f -not -name '*.so' -not -name 'ptxas*' -not -path '*__pycache__*' 2>/dev/null | grep -v ' ') \
	CMakeLists.txt CMakePresets.json setup.py pyproject.toml $(wildcard benchmarks/*.py benchmarks/predicted.json configs/*.toml)

.PHONY: demo test test-slow test-build fuzz test-cuda test-gpu test-simulator predict dry-run ptxas lint format bench results clean \
	install docs help

.DEFAULT_GOAL := help

help: ## list the targets and variables
	@awk -F ' ## ' '/^[a-z-]+:.* ## / { sub(/:.*/, "", $$1); printf "  make %-12s %s\n", $$1, $$2 } \
	  /^##/ { sub(/^## ?/, ""); notes = notes "  " $$0 "\n" } END { printf "%s", notes }' Makefile

install: .cache/installed ## build the package and install it into VENV

.cache/requirements-run: requirements-run.txt requirements-common.txt
	@mkdir -p .cache
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "make: installing requirements-run.txt (torch and what the package needs) into $(VENV): a minute, and the download." \
	  "VENV=/path names an environment that has them"
	"$(BIN)/python" -m pip install --quiet --requirement requirements-run.txt
	@touch $@

.cache/requirements-dev: .cache/requirements-run requirements-dev.txt
	@echo "make: adding requirements-dev.txt (what lints, tests and evaluates) to $(VENV)"
	"$(BIN)/python" -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

.cache/requirements-docs: requirements-docs.txt
	@mkdir -p .cache
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --requirement requirements-docs.txt
	@touch $@

# By whichever pip there is. A folder whose name has the version, moved there when it is complete.
$(CUTLASS):
	@mkdir -p .cache
	@for python in "$(BIN)/python" "$(BIN_CUDA)/python" "$(PYTHON)"; do \
	  "$$python" -m pip --version >/dev/null 2>&1 || continue; \
	  rm -rf "$@.new"; \
	  "$$python" -m pip install --quiet --no-deps --no-compile --target "$@.new" nvidia-cutlass==$(CUTLASS_VERSION) \
	    && mv "$@.new" "$@" && exit; \
	done; \
	echo "make: pip could not fetch the headers of CUTLASS; ILLADA_CUTLASS_DIR=/path/to/cutlass names others" >&2; \
	exit 1

# What ILLADA_CUDA was when it was last set: only another value builds again.
.cache/asked: FORCE
	@mkdir -p .cache
	@[ -z "$(ILLADA_CUDA)" ] && [ -f $@ ] || echo "$(ILLADA_CUDA)" | cmp -s - $@ || echo "$(ILLADA_CUDA)" >$@

FORCE:

.cache/installed: .cache/requirements-run .cache/asked $(SOURCES)
	@cuda="$$(cat .cache/asked)"; \
	if [ -z "$$cuda" ]; then \
	  cuda=off; \
	  ! "$(BIN)/python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || cuda=auto; \
	  [ $$cuda = auto ] || [ -z "$(NVCC)" ] || \
	    echo "make: an nvcc is here, but no GPU that this environment's torch sees: no CUDA kernels (ILLADA_CUDA=on builds them)"; \
	fi; \
	case "$$cuda" in \
	  off | OFF | Off) echo "make: building for CPUs: under a minute";; \
	  *) echo "make: building, one to five minutes with CUDA kernels on two cores (ILLADA_CUDA=off: none, under a minute;" \
	      "ILLADA_CUDA_ARCHS=80-real: one kind of GPU)"; \
	    $(FETCH);; \
	esac; \
	ILLADA_CUDA="$$cuda" "$(BIN)/python" -m pip install --quiet --no-deps --force-reinstall .
	@touch $@

.cache/requirements-cuda: requirements-cuda.txt requirements-common.txt
	@mkdir -p .cache
	test -x "$(BIN_CUDA)/python" || "$(PYTHON)" -m venv "$(VENV_CUDA)"
	"$(BIN_CUDA)/python" -m pip install --quiet --requirement requirements-cuda.txt
	@touch $@

# Into VENV_CUDA, for this machine's GPU or as PTX for the simulator. CMake's folder is kept and pip's isolation is off,
# whose tools are at a new path each time: only changed files are compiled again.
CUDA_BUILD = PATH="$$(cd "$(BIN_CUDA)" && pwd):$$PATH" ILLADA_BUILD_DIR="$(CURDIR)/build/$(1)" \
	"$(BIN_CUDA)/python" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .

.cache/installed-gpu: .cache/requirements-cuda $(HEADERS) $(SOURCES)
	@rm -f .cache/installed-simulator
	ILLADA_CUDA=on CMAKE_ARGS="-DILLADA_NVCC_FLAGS=-lineinfo" $(call CUDA_BUILD,gpu)
	@touch $@

# The preset says all of the build; a variable from outside would outweigh it.
.cache/installed-simulator: .cache/requirements-cuda $(HEADERS) $(SOURCES)
	@rm -f .cache/installed-gpu
	unset ILLADA_CUDA ILLADA_CUDA_ARCHS ILLADA_CUDART; CMAKE_ARGS="--preset sim" $(call CUDA_BUILD,sim)
	@touch $@

demo: ## prepare text, train a tiny model, generate: about 6 minutes on two cores
	@mkdir -p .cache && date +%s > .cache/demo-began
	@$(MAKE) --no-print-directory install
	"$(BIN)/python" examples/demo.py --out runs/demo --began "$$(cat .cache/demo-began)"

test: .cache/requirements-dev install ## the fast tests
	"$(BIN)/python" -m pytest -q

test-slow: .cache/requirements-dev install ## packaging, kills, some damaged files, the C++ library, the commands of the docs
	"$(BIN)/python" -m pytest -q -m slow

test-build: .cache/requirements-dev install ## builds with each compiler, CMake and Python that is here: from 3 minutes on
	"$(BIN)/python" -m pytest -q -m "slow or builds" tests/builds/test_builds.py $(ARGS)

fuzz: .cache/requirements-dev install ## 20,000 damaged files: up to half an hour; what fails is left in .cache/fuzz
	ILLADA_FUZZ="$(EXAMPLES)" "$(BIN)/python" -m pytest -q -m slow -rA --tb=line --show-capture=stdout tests/fuzz $(ARGS)

test-cuda: ## the CUDA kernels, on a GPU or a simulator; needs nvcc
	@command -v "$${CUDACXX:-nvcc}" >/dev/null || { \
	  echo "make test-cuda: no nvcc found; install CUDA 12.3 or newer, or set CUDACXX=/path/to/nvcc (docs/install.md)" >&2; \
	  exit 1; }
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then $(MAKE) --no-print-directory test-gpu; \
	elif [ -x "$(CUSIM)/cusim" ]; then $(MAKE) --no-print-directory test-simulator; \
	else echo "make test-cuda: nvidia-smi lists no GPU, and CUSIM ('$(CUSIM)') names no simulator's folder; run it" \
	  "on a machine with a GPU, or set CUSIM=/path/to/cusim" >&2; exit 1; fi

test-gpu: .cache/installed-gpu
	ILLADA_REQUIRE_CUDA=1 "$(BIN_CUDA)/python" -m pytest -q tests/cuda tests/ops $(ARGS)

# race, proxy: shared memory accessed without synchronisation, and a missing fence between ordinary stores and TMA.
test-simulator: .cache/installed-simulator
	@cusim="$$(cd "$(CUSIM)" && pwd)"; for mode in $(MODES); do \
	  echo "tests/cuda and tests/ops on the simulator: $$mode$(if $(DEVICE), as $(DEVICE))"; \
	  ILLADA_REQUIRE_CUDA=1 PYTHONPATH="$$cusim" "$$cusim/cusim" run --async "$$mode" $(if $(CHECKS),--check "$(CHECKS)") \
	    $(if $(DEVICE),--device "$(DEVICE)") -- "$(BIN_CUDA)/python" -m pytest -q -p torch_on_cusim tests/cuda tests/ops $(ARGS) \
	    || exit 1; \
	done

predict: .cache/installed-simulator ## benchmarks/predicted.json: the kernels' times by the simulator's model
	CUSIM="$(CUSIM)" "$(BIN_CUDA)/python" -m benchmarks.predict $(if $(ONLY),--only "$(ONLY)") $(ARGS)

dry-run: .cache/installed-simulator ## benchmarks/run_on_gpu.sh on the simulator, with small shapes
	CUSIM="$(CUSIM)" PYTHON="$(BIN_CUDA)/python" bash benchmarks/run_on_gpu.sh --dry-run 10 runs/dry-run

ptxas: $(HEADERS) ## registers, spills and shared memory of each kernel against the budget; needs nvcc
	"$(PYTHON)" cmake/ptxas.py $(if $(UPDATE),--update) $(ARGS)

lint: .cache/requirements-dev $(HEADERS) ## ruff, clang-format, mypy, layers, codespell, lines of docs, clang-tidy for products of sizes
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$(BIN)/clang-format" --dry-run --Werror
	"$(BIN)/mypy"
	PYTHONPATH=python "$(BIN)/lint-imports" --no-cache
	"$(BIN)/codespell" . .ci/*
	"$(BIN)/python" cmake/docs_lines.py
	"$(BIN)/python" cmake/tidy.py

format: .cache/requirements-dev ## ruff and clang-format, writing
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .
	find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$(BIN)/clang-format" -i

bench: install ## all benchmarks, into runs/bench
	@mkdir -p runs/bench
	"$(BIN)/python" -m benchmarks all --json runs/bench/all.jsonl --plot runs/bench/all.png

results: install ## docs/results.md and its plots, from benchmarks/results
	"$(BIN)/python" -m benchmarks.results_page

docs: .cache/requirements-docs ## build/site: the pages of docs/ and the API reference; a broken link is an error
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict --config-file docs/site/mkdocs.yml

clean: ## remove builds, environments and caches, not runs/ and data/
	rm -rf build dist .cache .venv .venv-cuda .pytest_cache .ruff_cache .mypy_cache python/*.egg-info  # not runs/ and data/
	find python -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
