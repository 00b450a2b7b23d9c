# On a bare machine `make train` and `make test` are all there is to do: both first make .venv.

PYTHON ?= python3
VENV   ?= .venv

# Installed only where $(PYTHON) has no torch of its own that is new enough. The plain wheel brings
# 2.6 GB of CUDA libraries; a machine without GPUs is better off with
#   make train TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0

# More options for examples/train.py, or for pytest: make train ARGS="--steps 100"
ARGS   ?=

READY  := $(VENV)/.ready
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: train test lint clean

train: $(READY)
	$(VENV)/bin/python examples/train.py $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(READY)
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Prints the package folders of a Python that has torch, to be seen from the environment too.
define folders
import sys
from importlib.metadata import version
assert tuple(map(int, version("torch").split(".")[:2])) >= (2, 11)
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
endef
export folders

# Where there is a torch but no package index, what the machine already has must do.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	set -e; pth=$$(echo $(VENV)/lib/python3*/site-packages)/machine.pth; \
	$(PYTHON) -c "$$folders" > $$pth 2> /dev/null || { rm $$pth; \
	$(VENV)/bin/python -m pip install $(TORCH); }
	PIP_RETRIES=2 $(VENV)/bin/python -m pip install --quiet --editable '.[dev]' || $(VENV)/bin/python -c \
	'import torch, numpy, pytest, hypothesis; print("no package index: going on with what this machine has")'
	touch $@
