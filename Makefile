# Two commands matter: `make report` proves and shows, `make test` tests. Both create .venv when it is missing.

PYTHON ?= python3
# Workers of the test run: one a core, up to a number that keeps the memory sane (each holds its own PyTorch).
WORKERS ?= auto
MAX_WORKERS ?= 8

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Each worker computes on one thread; tests that are about threads set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses $(MAX_WORKERS) --dist worksteal -q

.PHONY: help report test quick bench lint format install clean

help:
	@echo "make report   run every parity case, train, time; write reports/index.html"
	@echo "make test     formatting, lint, types, then the whole test suite"
	@echo "make quick    the part of the test suite that takes less than a minute"
	@echo "make bench    step times of the optimizers against PyTorch's"
	@echo "make lint     formatting, lint and types alone"
	@echo "make format   rewrite the files as the linter wants them"
	@echo "make clean    remove what these commands made, the virtual environment included"

report: $(INSTALLED)
	$(BIN)/python -m scripts.report

test: lint
	$(PYTEST)

quick: $(INSTALLED)
	$(PYTEST) -m "quick and not slow"

bench: $(INSTALLED)
	$(BIN)/python -m pytest parity_tests/benchmarks/bench_*.py --benchmark-enable --device all -q -s --tb=line

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict reimpl

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(INSTALLED)

# The stamp is touched last, so an install that was cut short runs again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "reimpl needs Python 3.11 or newer; $(PYTHON) is %d.%d.%d. Name another: make PYTHON=python3.12" % v[:3])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) reports runs dist build .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
