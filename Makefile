# Every target makes the virtual environment it needs; VENV and PYTHON may be overridden.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests; each takes about 2 GB.
JOBS ?= 2

.PHONY: demo test lint clean

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

## Train the classifier on scikit-learn's digits, then a translator on numbers and dates in words; each leaves a
## TensorBoard page, a CSV and a PNG under runs/.
demo: $(VENV)/.base
	$(BIN)/lightning-rectify fit --config configs/classifier.yaml
	$(BIN)/lightning-rectify fit --config configs/translation.yaml

## Lint, then every test that is not marked slow; JOBS=1 for one process.
test: lint
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs lightning_logs *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
