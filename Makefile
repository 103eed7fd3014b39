# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

.PHONY: help venv demo test study-smoke lint types clean

help:
	@echo 'make demo   forget, nowcast and transfer on the embedded digits (about 2 minutes)'
	@echo 'make test   lint, type check, the fast test suite and the smoke study'
	@echo 'make clean  remove .venv, the demo and caches'

# The stamp is newer than pyproject.toml if and only if what it asks for is installed.
.venv/stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; found " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]'
	touch .venv/stamp

venv: .venv/stamp

demo: venv
	$(BIN)/python bin/forget.py --workdir=$(DEMO) --config=configs/forget_digits.py
	$(BIN)/python bin/nowcast.py --workdir=$(DEMO) --steps=3 \
	  --predictor=known,known_history_free,shrink,average,task_vector,linear_fit,log_fit,tsv
	$(BIN)/python bin/transfer.py --workdir=$(DEMO) --config=configs/transfer_digits.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile
	$(MAKE) study-smoke

# The whole transfer study, shrunk, and its report, in a folder that is thrown away.
study-smoke: venv
	folder=$$(mktemp -d) && \
	$(BIN)/python bin/study.py --workdir=$$folder --config=configs/study_smoke.py && \
	$(BIN)/python bin/study.py --workdir=$$folder --report=$$folder/transfer.md && \
	rm -r $$folder

clean:
	rm -rf .venv $(DEMO) workdir .pytest_cache .mypy_cache .ruff_cache
