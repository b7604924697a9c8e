# Stillwater. `make help` lists the commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA ?=
# `make run` is a COMBO cut to fit two cores; a file's own defaults are the paper's million updates.
RUN ?= --num-updates 20000 --eval-every 1000 --max-epochs 25 --actor-lr 3e-4 --rho model \
	--widths 256 256

# `make bench-scores BUDGET=full` is a million updates of each; short is a night of two cores.
BUDGET ?= short

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow lint datasets bench-speed bench-scores report

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

datasets: install  ## the full set of MuJoCo datasets that is not yet there; SAC, hours for each robot
	@for robot in HalfCheetah Hopper Walker2d; do \
		for kind in random medium medium-replay medium-expert expert; do \
			name=data/stillwater/$$(echo $$robot | tr A-Z a-z)/$$kind-v0; \
			if [ -d $$name ]; then echo "$$name is there"; continue; fi; \
			$(BIN)/python benchmarks/collect.py --env-id $$robot-v5 --kind $$kind || exit; \
		done; \
	done

bench-speed: install  ## how fast each algorithm is on this machine
	$(BIN)/python benchmarks/speed.py

bench-scores: install  ## every algorithm on three datasets; goes on where it was stopped
	$(BIN)/python benchmarks/scores.py --budget $(BUDGET)

report: install  ## README's tables and the curves, of all runs
	$(BIN)/python benchmarks/report.py
