# Every verb creates what it needs: an environment in .venv, made by PYTHON.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test test-deep check format experiment benchmark clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on --upgrade pip
	$(BIN)/python -m pip install --progress-bar on --editable ".[dev]"
	touch $@

test: $(VENV)/ready  ## the tests, in parallel, with a progress bar
	$(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered

test-deep: $(VENV)/ready  ## the full products, Hypothesis with 50 times the examples
	$(BIN)/python -m pytest -n auto -m "deep or not deep" --hypothesis-profile=deep

check: $(VENV)/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

experiment: $(VENV)/ready  ## train a Transformer that translates, and use it
	$(BIN)/python experiments/translate.py

benchmark: $(VENV)/ready  ## our backends against jax.nn and PyTorch
	$(BIN)/python experiments/benchmark.py

clean:
	rm -rf $(VENV) .venv-peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build *.egg-info
