# make train   train a GPT on real text with two ranks and ZeRO-2
# make test    lint, type-check and run the whole suite
# make lint    only the first two
# make bench   compare with the original, DDP and FSDP2: hours; BENCH=--quick, BENCH="--only step_bf16" take less
# make clean   remove the virtual environment and what was built
#
# PYTHON=python3.12            the Python to make the virtual environment from
# JOBS=4                       how many test files run at once
# TORCH="torch==X+Y ..."       another torch than the pinned one: arguments for pip, at the first install

PYTHON ?= python3
SHELL  := bash
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH  ?=
BENCH  ?=
JOBS   ?= 2

.PHONY: train test lint bench clean

train: $(VENV)/.installed
	$(BIN)/deepspeed --num_gpus 2 examples/pretrain_gpt.py --deepspeed --deepspeed_config examples/ds_config.json

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/suite.py $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are older than what they were installed from when that changes.
$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(VENV) has a Python older than 3.10; remove it with: make clean"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null
	@echo "Installing the requirements into $(VENV): some minutes the first time"
	@$(PIP) $(if $(TORCH),$(TORCH) -r <(grep -v '^torch==' requirements.txt),-r requirements.txt)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	@$(PIP) -r $(if $(TORCH),<(grep -v '^-r ' $<),$<)
	@touch $@
