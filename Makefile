# Everything a fresh machine needs is made by these targets; `make quickstart` and `make test` are the two to know.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in two processes of one thread each.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install quickstart test test-slow lint format clean system

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/system_libraries.sh
	@bash scripts/system_libraries.sh
	@bash scripts/python_version.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,quantised,carla,carracing,export]"
	@touch $(STAMP)

quickstart: install
	$(BIN)/covr fit --config quickstart.yaml

test: install
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" tests

test-slow: install
	OMP_NUM_THREADS=1 $(PYTEST) -m slow tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
