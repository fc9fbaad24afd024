# A fresh machine needs two commands: make demo, make test. Every target sets up .venv first.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults golden lint format bench bench-data bench-index bench-step fuzz chaos clean

BIN := .venv/bin

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-11s %s\n", $$1, $$2 }'

setup:  ## make .venv from the lock
	@tools/setup.sh

demo: setup  ## run the full pipeline on synthetic sounds, offline; or on yours: make demo AUDIO=folder (a subfolder per class)
	@$(BIN)/python tools/demo.py $(if $(AUDIO),--audio "$(AUDIO)") --out demo

test: setup  ## run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

test-faults: setup  ## run the long half of the fault matrix: 40 kills of real runs, dead ranks, lost machines (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

golden: setup  ## check every official number, on each attention path of a CPU (needs ../shared, see CONTRIBUTING.md)
	@$(BIN)/python tests/golden_check.py $(or $(ASDA_SHARED),../shared)/golden

lint: setup  ## run ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: setup  ## let ruff rewrite the code
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: setup  ## time the parts beside baselines
	@$(BIN)/python tools/bench/bench.py

bench-data: setup  ## time the data pipeline, from shards to patches and masks, beside three usual ways (three minutes)
	@$(BIN)/python tools/bench/bench.py data $(ARGS)

bench-index: setup  ## open an index of 100,000,000 clips and jump about in it (half a minute, 0.5 GB of /tmp)
	@$(BIN)/python tools/bench index

bench-step: setup  ## time one training step of the base model beside plain fp32 PyTorch (some minutes)
	@$(BIN)/python tools/bench/bench.py step $(ARGS)

chaos: setup  ## put 20 random faults on short runs of all kinds, some as root only (15 minutes; all: ARGS='--trials 500')
	@$(BIN)/python tools/chaos --record chaos/record.jsonl --trials 20 $(ARGS)

fuzz: setup  ## read 20,000 mutants of encoded sounds, and files that hold other than they declare (four minutes)
	@$(BIN)/python tools/fuzz kinds
	@OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz mutants $(ARGS)

clean:  ## remove the demo and the caches of tests and ruff; keep runs and shards
	rm -rf demo .pytest_cache .ruff_cache .hypothesis
