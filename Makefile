# Every target sets up its own virtual environment, .venv, when there is none. What they do: CONTRIBUTING.md.
#
#   make test ARGS="-k snapshot"     further arguments for pytest
#   make test JOBS=4                 so many tests at once; 2 without it, 0 for one after the other in one process
#   make demo PYTHON=python3.12      which Python makes the environment; any from 3.11 on
#   make test PIP_ARGS="..."         further arguments for pip install, such as an index
#   make test TORCH_BUILD=any        take the build of torch that pip finds, CUDA or not

.DEFAULT_GOAL := test
.PHONY: setup demo test check format bench clean

# The first of these that runs, is new enough, and can make virtual environments.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)
PIP_ARGS ?=
TORCH_BUILD ?= auto
ARGS ?=
# Files of tests are handed out whole, in order: the slow ones come first, and what a file prepares is prepared once.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

$(INSTALLED): pyproject.toml constraints.txt
	@python="$(PYTHON)"; test -n "$$python" || { \
		echo "No Python of version 3.11 or newer with venv was found; name one: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }; \
	"$$python" dev/set_up.py $(VENV) --goal "$(MAKECMDGOALS)" --pip-args="$(PIP_ARGS)" --torch-build $(TORCH_BUILD)
	@touch $@

setup: $(INSTALLED)
	@:

demo: $(INSTALLED)
	@$(BIN)/python examples/demo/run.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

format: $(INSTALLED)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	@$(BIN)/python benchmarks/export.py $(ARGS)

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/stillframe.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
