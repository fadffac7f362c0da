PYTHON ?= python

.PHONY: demo test test-fast lint bench
demo:        ## miniature models, a small identity set, every stage, checked
	$(PYTHON) -m ipvg_ray demo demo

test:        ## everything, slow tests included
	$(PYTHON) -m pytest -q

test-fast:   ## unit tests only, about a minute
	$(PYTHON) -m pytest -q -m "not slow"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench:
	for file in benchmarks/*.py; do $(PYTHON) $$file || exit 1; done
