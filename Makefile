# One door for each habit. `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
RUN := HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error $(BIN)/python
BASE := examples/toy-sdxl
DEMO := runs/demo

.PHONY: help install demo app test test-slow check format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[app,plots,train,dev]'
	touch $@

install: .venv/.installed ## create .venv with the tested versions

demo: install ## teach the toy SDXL a toy from five photos and draw before/after
	$(RUN) -m examples.demo --out $(DEMO)

app: install ## open the page on the toy SDXL
	mkdir -p runs
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m app --base $(BASE) --adapters runs

test: install ## run the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: install ## run the long tests: the full-size SDXL UNet (about 7 GB), pre-training's whole command
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

check: install ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## time the methods on the tiny UNet
	$(RUN) -m benchmarks.speed --unet tiny --latent 32

clean: ## remove .venv and what the demo made (not build/ and your other runs/)
	rm -rf .venv $(DEMO)
