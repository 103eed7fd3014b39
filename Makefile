# Everything runs in $(VENV), which the first target that needs it makes: with what pyproject.toml
# allows, and the versions that the file CONSTRAINTS pins, if it is given.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: help venv demo docs package test fast-tests test-newest test-oldest test-reliability \
  study-smoke lint types clean round-trips

help:
	@echo 'make demo   forget, nowcast and transfer on generated glyphs (under 2 minutes)'
	@echo 'make docs   the site, in site/: any warning fails, and the notebook is run'
	@echo 'make test   lint, type check, the fast test suite and the smoke study'
	@echo 'make test-newest, make test-oldest'
	@echo '            the same, and the fast test suite alone, on the versions that .ci/*.txt pin'
	@echo 'make test-reliability   kill, corrupt, fuzz and real names in full (under 20 minutes)'
	@echo 'make round-trips  checkpoints of timm, transformers, PEFT, Keras, ... there and back (5 minutes)'
	@echo 'make package   build the package into dist/ and try it in a clean environment'
	@echo 'make clean  remove virtual environments, the demo and caches'

# The stamp is newer than what it depends on if and only if what that asks for is installed.
$(VENV)/stamp: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev]' \
	  $(addprefix --constraint ,$(CONSTRAINTS))
	touch $(VENV)/stamp

venv: $(VENV)/stamp

demo: venv
	$(BIN)/python -m know_jax demo --workdir=$(DEMO)

# In the same environment, with the extra `docs`: examples and notebook need all the rest too.
docs: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,dev,docs]'
	$(BIN)/python -m pytest tests/docs
	$(BIN)/mkdocs build --strict

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

test: lint types
	$(MAKE) fast-tests
	$(MAKE) study-smoke

fast-tests: venv
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

# On the newest and on the oldest versions that are known to work, as .ci/run does; how the lock
# files are made again stands in them. No lint and no types on the oldest: tools change their minds.
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.ci/newest.txt

test-oldest:
	$(MAKE) fast-tests VENV=.venv-oldest CONSTRAINTS=.ci/oldest.txt

# In full: what `make test` has in a short form.
test-reliability: venv
	$(BIN)/python -m pytest --thorough --numprocesses=2 --dist=worksteal tests/reliability

# The whole transfer study, shrunk, and its report, in a folder that is thrown away.
study-smoke: venv
	folder=$$(mktemp -d) && \
	$(BIN)/python bin/study.py --workdir=$$folder --config=configs/study_smoke.py && \
	$(BIN)/python bin/study.py --workdir=$$folder --report=$$folder/transfer.md && \
	rm -r $$folder

# What other libraries make of predicted checkpoints. timm wants transforms of torchvision, which has
# no release that imports beside every torch; 0.15.2 does, and has no part in what is shown.
ROUND_TRIPS := .venv-round-trips/bin
# An index of one's own, or a folder of wheels, where that one cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

round-trips: .ci/round_trips.txt .ci/newest.txt
	$(MAKE) venv VENV=.venv-round-trips CONSTRAINTS=.ci/newest.txt
	$(ROUND_TRIPS)/python -m pip install --quiet --disable-pip-version-check \
	  --extra-index-url $(TORCH_INDEX) --requirement .ci/round_trips.txt
	$(ROUND_TRIPS)/python -m pip install --quiet --no-deps torchvision==0.15.2
	$(ROUND_TRIPS)/python tests/tools/round_trips.py --output=docs/results/round_trips.md
	KERAS_BACKEND=jax $(ROUND_TRIPS)/python -m pytest tests/docs/test_pages.py -k 'huggingface or keras or pytorch'

# The source distribution and the wheel, in dist/, tried in a clean environment and an empty folder.
package:
	PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) .ci/try_package

clean:
	rm -rf dist .venv .venv-newest .venv-oldest .venv-round-trips $(DEMO) site workdir .pytest_cache \
	  .mypy_cache .ruff_cache
