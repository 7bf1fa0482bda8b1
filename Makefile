# Everything a checkout can do, in a virtual environment of its own. Needs python3 (3.11 or newer) and a C++ compiler.
#   make demo    prepare text, train a tiny model, generate: about 6 minutes on two cores
#   make test    the fast tests;  make test-slow: the others;  make bench: the benchmarks
#   make results docs/results.md and its plots from benchmarks/results/*.jsonl
#   make test-build  builds with each compiler, CMake and Python that is here (tests/test_builds.py): from 3 minutes on
#   make fuzz    20,000 damaged files, EXAMPLES=N another number: up to half an hour; what fails is left in .cache/fuzz
# CUDA kernels are built where this environment's torch finds a GPU for them; ILLADA_CUDA=on builds them all the same, off
# never, and make remembers which. VENV=/path keeps the environment elsewhere. No path is used unquoted: folders may have spaces in their names.
# With an nvcc (CUDA 12.3 or newer), no GPU needed:
#   make ptxas      registers, spills and shared memory of each kernel against csrc/ptxas_budget.json (UPDATE=1 writes it)
#   make test-cuda  tests/cuda with a CUDA build of torch (5.5 GB, in VENV_CUDA): on a GPU, else on a simulator, CUSIM.
#                   ARGS="-k remask" goes to pytest; of the simulator MODES="lazy", DEVICE=a100 and CHECKS= are options
#   make predict    benchmarks/predicted.json: the simulator's times for what `python -m benchmarks compare` compares;
#                   ONLY=backward predicts some cases again and keeps the others
#   make dry-run    benchmarks/run_on_gpu.sh on the simulator, with small shapes

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
	install

install: .cache/installed

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

demo:
	@mkdir -p .cache && date +%s > .cache/demo-began
	@$(MAKE) --no-print-directory install
	"$(BIN)/python" examples/demo.py --out runs/demo --began "$$(cat .cache/demo-began)"

test: .cache/requirements-dev install
	"$(BIN)/python" -m pytest -q

test-slow: .cache/requirements-dev install
	"$(BIN)/python" -m pytest -q -m slow

test-build: .cache/requirements-dev install
	"$(BIN)/python" -m pytest -q -m "slow or builds" tests/test_builds.py $(ARGS)

fuzz: .cache/requirements-dev install
	ILLADA_FUZZ="$(EXAMPLES)" "$(BIN)/python" -m pytest -q -m slow -rA --tb=line --show-capture=stdout tests/fuzz $(ARGS)

test-cuda:
	@command -v "$${CUDACXX:-nvcc}" >/dev/null || { \
	  echo "make test-cuda: no nvcc found; install CUDA 12.3 or newer, or set CUDACXX=/path/to/nvcc (docs/install.md)" >&2; \
	  exit 1; }
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then $(MAKE) --no-print-directory test-gpu; \
	elif [ -x "$(CUSIM)/cusim" ]; then $(MAKE) --no-print-directory test-simulator; \
	else echo "make test-cuda: nvidia-smi lists no GPU, and CUSIM ('$(CUSIM)') names no simulator's folder; run it" \
	  "on a machine with a GPU, or set CUSIM=/path/to/cusim" >&2; exit 1; fi

test-gpu: .cache/installed-gpu
	ILLADA_REQUIRE_CUDA=1 "$(BIN_CUDA)/python" -m pytest -q tests/cuda $(ARGS)

# race, proxy: shared memory accessed without synchronisation, and a missing fence between ordinary stores and TMA.
test-simulator: .cache/installed-simulator
	@cusim="$$(cd "$(CUSIM)" && pwd)"; for mode in $(MODES); do \
	  echo "tests/cuda on the simulator: $$mode$(if $(DEVICE), as $(DEVICE))"; \
	  ILLADA_REQUIRE_CUDA=1 PYTHONPATH="$$cusim" "$$cusim/cusim" run --async "$$mode" $(if $(CHECKS),--check "$(CHECKS)") \
	    $(if $(DEVICE),--device "$(DEVICE)") -- "$(BIN_CUDA)/python" -m pytest -q -p torch_on_cusim tests/cuda $(ARGS) \
	    || exit 1; \
	done

predict: .cache/installed-simulator
	CUSIM="$(CUSIM)" "$(BIN_CUDA)/python" -m benchmarks.predict $(if $(ONLY),--only "$(ONLY)") $(ARGS)

dry-run: .cache/installed-simulator
	CUSIM="$(CUSIM)" PYTHON="$(BIN_CUDA)/python" bash benchmarks/run_on_gpu.sh --dry-run 10 runs/dry-run

ptxas: $(HEADERS)
	"$(PYTHON)" cmake/ptxas.py $(if $(UPDATE),--update) $(ARGS)

lint: .cache/requirements-dev $(HEADERS)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$(BIN)/clang-format" --dry-run --Werror
	"$(BIN)/mypy"
	"$(BIN)/codespell" . .ci/*
	"$(BIN)/python" cmake/docs_lines.py
	"$(BIN)/python" cmake/tidy.py

format: .cache/requirements-dev
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .
	find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$(BIN)/clang-format" -i

bench: install
	@mkdir -p runs/bench
	"$(BIN)/python" -m benchmarks all --json runs/bench/all.jsonl --plot runs/bench/all.png

results: install
	"$(BIN)/python" -m benchmarks.results_page

clean:
	rm -rf build dist .cache .venv .venv-cuda .pytest_cache .ruff_cache .mypy_cache python/*.egg-info  # not runs/ and data/
	find python -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
