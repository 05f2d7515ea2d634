# `make` alone prints this list.
SHELL := /bin/bash
BIN := .venv/bin
PYTHON ?= python3
# the shell's own variable: make would put the path there unescaped
RUN := PATH="$$PWD/$(BIN):$$PATH"
# three processes on two cores: tests wait for servers and queues, too; torch, left to itself, would start two threads in each
PYTEST := OMP_NUM_THREADS=1 pytest -n 3 --dist loadfile --no-loadscope-reorder
# Arithmetic as other CPUs do it: torch's own loops, MKL's products, oneDNN's; none with instructions for bfloat16.
# An old CPU, one with AVX2, one with AVX-512.
KERNELS := \
"ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41" \
"ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2" \
"ATEN_CPU_CAPABILITY=avx512 MKL_CBWR=AVX512 ONEDNN_MAX_CPU_ISA=AVX512_CORE"

# of `make sweep`; OVERRIDES takes more: OVERRIDES="-S recipes.stable.lr=3e-5,1e-4"
RECIPES := notebook,stable
REWARDS := embedding,length
SEEDS := range(0,3)
STEPS :=
JOBS := 2
THREADS := 1
OVERRIDES :=

.PHONY: help repro cure sweep test test-all test-faults unit lint audit ui bench clean

help:  ## print the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	@echo 'installing into .venv, some minutes the first time'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

repro: $(BIN)/installed  ## install into .venv and run the pipeline on the embedded default
	$(RUN) dvc repro

cure: $(BIN)/installed  ## after a collapse: try the recommended change, show both runs side by side
	$(RUN) reinforce cure

sweep: $(BIN)/installed  ## recipes x rewards x seeds by DVC's queue, then compared; RECIPES= REWARDS= SEEDS= STEPS= JOBS= OVERRIDES=
	$(RUN) reinforce sweep --jobs $(JOBS) -S 'recipe=$(RECIPES)' -S 'reward=$(REWARDS)' -S 'seed=$(SEEDS)' \
	-S train.threads=$(THREADS) $(if $(STEPS),-S train.steps=$(STEPS)) $(OVERRIDES)

test: $(BIN)/installed lint  ## every promise once, the pipeline as a user runs it included
	$(RUN) SCREENSHOTS="$$PWD/.screenshots" $(PYTEST)

test-all: test  ## then the exhaustive tests: kills in number, a team's servers, every model family, the kernels of other CPUs
	$(RUN) $(PYTEST) -m exhaustive
	@for kernels in $(KERNELS); do echo "numeric tests with $$kernels"; $(RUN) env $$kernels $(PYTEST) -m "numeric and not slow and not exhaustive" || exit; done

test-faults: $(BIN)/installed  ## every test that injects faults, in full number, to count them -> docs/reliability.json
	$(RUN) FAULTS=full $(PYTEST) -m faults

unit: $(BIN)/installed  ## the fast tests
	$(RUN) pytest -m 'not slow'

lint: $(BIN)/installed
	$(RUN) ruff check . custom/example.py && $(RUN) ruff format --check . custom/example.py && $(RUN) mypy && $(RUN) lint-imports --no-logo

audit:  ## known vulnerabilities of the pinned dependencies, by PyPI's database; needs the internet
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" \
	&& "$$folder/bin/pip" install -q pip-audit \
	&& "$$folder/bin/pip-audit" --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt \
	|| { echo 'audit: a vulnerability was found, or not every package could be looked up; the lines above say which' >&2; exit 1; }

ui: $(BIN)/installed  ## MLflow's UI on loopback, to compare runs
	$(RUN) reinforce ui $(PORT)

bench: $(BIN)/installed  ## speed beside the notebook's loop and trl, 20 minutes, on the GPU where there is one -> docs/speed.json, speed_gpu.json
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,benchmarks]'
	$(RUN) python -m benchmarks.speed run

clean:  ## remove .venv; keeps data, runs and caches
	rm -rf .venv
