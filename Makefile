# Short names for `python3 run.py ...`; run.py makes the environment in .venv by itself.
PYTHON ?= python3

.PHONY: help demo test lint types bench docs clean

help:
	@$(PYTHON) run.py --help

demo test bench docs:
	@$(PYTHON) run.py $@

lint types:
	@$(PYTHON) run.py test --only $@

clean:
	rm -rf .venv site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
