# Stillwater. `make help` lists the commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA ?=

# `make run`: flags that fit two CPU cores. A file's own defaults are the paper's.
ALGORITHM ?= iql
RUN_awac := --num-updates 100000 --eval-every 5000
RUN_bc := --num-updates 50000 --eval-every 5000
RUN_combo := --num-updates 100000 --eval-every 5000 --widths 256 256 --max-epochs 100
RUN_mobile := $(RUN_combo)
RUN_mopo := $(RUN_combo)
RUN_cql := --num-updates 100000 --eval-every 5000 --num-actions 1
RUN_diffuser := --num-updates 16000 --eval-every 8000 --batch-size 32 --lr 5e-4 --plan-every 2 \
	--ddim-steps 5 --samples 16
RUN_decision_diffuser := --num-updates 16000 --eval-every 8000 --batch-size 32 --lr 5e-4
RUN_fql := --num-updates 100000 --eval-every 5000 --widths 256 256
RUN_cal_ql := $(RUN_cql)
RUN_discrete_bcq := --num-updates 100000 --eval-every 5000 --widths 64 64
RUN_discrete_cql := $(RUN_discrete_bcq)
RUN_rlpd := --num-updates 20000 --eval-every 2000
RUN_rvs := --num-updates 50000 --eval-every 5000 --batch-size 256 --widths 256 256
RUN_dt := --num-updates 5000 --eval-every 1000 --warmup 1000
RUN_iql := --num-updates 50000 --eval-every 5000
RUN ?= $(or $(RUN_$(ALGORITHM)),--num-updates 100000 --eval-every 5000)

# `make bench-scores`: short is two nights of two cores, full is a million updates of each method.
BUDGET ?= short

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow lint siblings datasets bench-speed bench-scores report

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(BIN)/.installed  ## Install the pinned packages into .venv; CUDA=13 for an NVIDIA GPU.

$(BIN)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(if $(CUDA),$(BIN)/python -m pip install --quiet "jax[cuda$(CUDA)]==$$(sed -n 's/^jax==//p' requirements.txt)")
	touch $@

run: install  ## Train IQL on bundled data, five minutes on two cores; ALGORITHM=combo: 40 minutes.
	$(BIN)/python algorithms/$(ALGORITHM).py $(RUN)

test: install  ## Run the fast tests.
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: install  ## Run the long tests, and those that need Ray or pyarrow.
	$(BIN)/python -m pip install --quiet ray==2.60.0 pyarrow==26.0.1
	$(BIN)/python -m pytest -m slow

lint: install  ## Check style and format with ruff.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

siblings: install  ## Copy a block to all files that share it: FILE=algorithms/iql.py BLOCK=MLP.
	$(BIN)/python tests/siblings.py $(FILE) $(BLOCK)

datasets: install  ## Collect the MuJoCo datasets that are missing; SAC takes hours for each robot.
	@for robot in HalfCheetah Hopper Walker2d; do \
		for kind in random medium medium-replay medium-expert expert; do \
			name=data/stillwater/$$(echo $$robot | tr A-Z a-z)/$$kind-v0; \
			if [ -d $$name ]; then echo "$$name exists"; continue; fi; \
			$(BIN)/python -m benchmarks.collect --env-id $$robot-v5 --kind $$kind || exit; \
		done; \
	done

bench-speed: install  ## Measure the speed of every algorithm on this machine.
	$(BIN)/python -m benchmarks.speed

bench-scores: install  ## Train every algorithm on three datasets; resumes where it was stopped.
	$(BIN)/python -m benchmarks.scores --budget $(BUDGET)

report: install  ## Write the tables and pictures of both READMEs from benchmarks/results.
	$(BIN)/python -m benchmarks.report
