# make train   train a GPT on real text with two ranks and ZeRO-2
# make test    lint, type-check and run the whole suite
# make bench   compare with the original, DDP and FSDP2

PYTHON ?= python3
SHELL  := bash
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?=

.PHONY: train test lint bench clean

train: $(VENV)/.installed
	$(BIN)/deepspeed --num_gpus 2 examples/pretrain_gpt.py --deepspeed --deepspeed_config examples/ds_config.json

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/compare.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),$(TORCH) -r <(grep -v "^torch==" requirements.txt),-r requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
