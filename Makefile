# Stillwater. `make help` lists the commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA ?=
# `make run` is a COMBO cut to fit two cores; a file's own defaults are the paper's million updates.
RUN ?= --num-updates 20000 --eval-every 1000 --max-epochs 25 --actor-lr 3e-4 --rho model \
	--widths 256 256

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow lint

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(BIN)/.installed  ## a virtual environment with the pinned packages; CUDA=13 for a GPU

$(BIN)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(if $(CUDA),$(BIN)/python -m pip install --quiet "jax[cuda$(CUDA)]==$$(sed -n 's/^jax==//p' requirements.txt)")
	touch $@

run: install  ## train COMBO on a bundled dataset, ten minutes or so on two cores
	$(BIN)/python algorithms/combo.py $(RUN)

test: install  ## the fast tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: install  ## the long tests
	$(BIN)/python -m pytest -m slow

lint: install  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
