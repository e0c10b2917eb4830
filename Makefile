# Every verb creates what it needs: an environment in VENV, made by PYTHON. ARGS are given to what
# the verb runs: make experiment ARGS="--steps 100", make test ARGS="-k causal".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# What users import; the rest is how it is done.
REFERENCE := jaxattn

# Verbs that run nothing which takes any.
WITHOUT_ARGS := check format peers compile-gpu clean
ifneq ($(ARGS),)
$(foreach verb,$(filter $(WITHOUT_ARGS),$(MAKECMDGOALS)),$(error make $(verb) takes no ARGS))
endif

.PHONY: test test-deep check format experiment language-model explain gallery docs faults \
	benchmark benchmark-gpu peers compile-gpu clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --editable ".[dev]"
	touch $@

# Coverage doubles their time: ARGS=--cov asks for it.
test: $(VENV)/ready  ## the tests, in parallel
	$(BIN)/python -m pytest -n auto $(ARGS)

test-deep: $(VENV)/ready  ## the full products, and 50 times the examples of Hypothesis
	$(BIN)/python -m pytest -n auto -m "deep or not deep" --hypothesis-profile=deep $(ARGS)

check: $(VENV)/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

experiment: $(VENV)/ready  ## train a Transformer that translates, and use it
	$(BIN)/python experiments/translate.py $(ARGS)

language-model: $(VENV)/ready  ## train a language model on packed documents, and sample
	$(BIN)/python experiments/language_model.py $(ARGS)

explain: $(VENV)/ready  ## how the mask works, and why -1e9 makes a key vanish, in numbers
	$(BIN)/python experiments/how_masking_works.py $(ARGS)

gallery: $(VENV)/ready  ## a picture of every mask
	$(BIN)/python experiments/gallery.py $(ARGS)

docs: $(VENV)/ready  ## the reference, from the docstrings: build/docs/index.html
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs $(REFERENCE) $(ARGS)

faults: $(VENV)/ready  ## train small models with wrong masks, and see what shows it
	$(BIN)/python experiments/mask_faults.py $(ARGS)

benchmark: $(VENV)/ready  ## against jax.nn and, after `make peers`, PyTorch
	$(BIN)/python experiments/benchmark.py $(ARGS)

benchmark-gpu: $(VENV)/ready  ## kernels on one GPU: checked first, then against the same peers
	$(BIN)/python experiments/benchmark.py --suite gpu $(ARGS)

peers: .venv-peers/ready  ## PyTorch, in an environment of its own
.venv-peers/ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --progress-bar on torch==2.13.0 numpy
	touch $@

compile-gpu: .venv-gpu/ready  ## the kernels for an H100, on a machine without one
	.venv-gpu/bin/python -W "ignore:The Pallas Triton backend" experiments/compile_gpu.py
.venv-gpu/ready: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --progress-bar on --editable .
	version=$$(.venv-gpu/bin/python -c "import jax; print(jax.__version__)") && \
	.venv-gpu/bin/python -m pip install --progress-bar on \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12
	touch $@

clean:
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build *.egg-info
