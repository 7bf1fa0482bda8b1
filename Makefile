# Everything a checkout can do, in a virtual environment of its own. Needs python3 (3.11 or newer) and a C++ compiler.
#   make demo    prepare text, train a tiny model, generate: about 5 minutes on two cores
#   make test    the fast tests;  make test-slow: the others;  make bench: the benchmarks
# VENV=/path keeps the environment elsewhere. No path is used unquoted: folders may have spaces in their names.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Sources of the installed package: it is built again when one of them changes.
SOURCES := $(shell find csrc cmake python -type f -not -name '*.so' -not -path '*__pycache__*' 2>/dev/null | grep -v ' ') \
	CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-slow lint format bench clean install

install: .cache/installed

.cache/requirements: requirements-dev.txt
	@mkdir -p .cache
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

.cache/installed: .cache/requirements $(SOURCES)
	"$(BIN)/python" -m pip install --quiet --no-deps --force-reinstall .
	@touch $@

demo:
	@mkdir -p .cache && date +%s > .cache/demo-began
	@$(MAKE) --no-print-directory install
	"$(BIN)/python" examples/demo.py --out runs/demo --began "$$(cat .cache/demo-began)"

test: install
	"$(BIN)/python" -m pytest -q

test-slow: install
	"$(BIN)/python" -m pytest -q -m slow

lint: .cache/requirements
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$(BIN)/clang-format" --dry-run --Werror
	"$(BIN)/mypy"

format: .cache/requirements
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$(BIN)/clang-format" -i

bench: install
	@mkdir -p runs/bench
	"$(BIN)/python" -m benchmarks remask --json runs/bench/remask.jsonl --plot runs/bench/remask.png
	"$(BIN)/python" -m benchmarks train-step --json runs/bench/train-step.jsonl --plot runs/bench/train-step.png

clean:
	rm -rf build dist .cache .venv .pytest_cache .ruff_cache .mypy_cache python/*.egg-info  # not runs/ and data/
	find python -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
