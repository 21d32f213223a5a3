# make demo: set up and run the whole path on embedded data. make test: set up, lint, types, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: demo study-siclip study-catlip test test-all lint wordnet debian clean

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipmill needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/webdataset-0.2.86 webdataset==0.2.86
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/transformers-4.46 \
		transformers==4.46.3 tokenizers==0.20.3 huggingface_hub==0.36.0
	touch $@

wordnet:
	bash tests/install_debian.sh wordnet-base

debian:
	bash tests/install_debian.sh wordnet-base chromium openssl munge slurmctld slurmd slurm-client

demo: $(VENV)/.done wordnet
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/demo.sh

study-siclip: $(VENV)/.done wordnet
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/study_siclip.sh

study-catlip: $(VENV)/.done wordnet
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/study_catlip.sh

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.done debian lint
	$(BIN)/python -m pytest --durations=10

test-all: $(VENV)/.done debian lint
	$(BIN)/python -m pytest --durations=20 -m "not gpu"

clean:
	rm -rf $(VENV) demo-run
