# Two commands: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-quant check format clean

install: $(INSTALLED)

# torch goes first and alone: a CPU machine must not be given a CUDA build by some other package.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/poweropd demo $(ARGS)

test: install
	$(BIN)/pytest $(ARGS)

# Not in .venv: there torchao would be imported, and warn, wherever transformers loads a model.
test-quant: install
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .quant \
		bitsandbytes torchao
	PYTHONPATH=.quant $(BIN)/pytest tests/test_teachers_quantized.py $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/test_layout.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
