# Two commands do everything: `make demo` and `make test`. Set-up happens by itself, once.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults coverage tools lint docs clean

RUN := .venv/bin/harmony-fast
TESTS := -m pytest --ignore tests/faults --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Unset: where bytecode may not be written, every start compiles everything again (10 s).
export PYTHONDONTWRITEBYTECODE :=

help:  ## What there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## Make .venv (done by the others when needed)
	@scripts/setup.sh

demo: setup  ## Train all five objectives on the demo data, evaluate, write runs/demo/report.html
	$(RUN) prepare demo/noto.tar data/demo/noto.beton --context 16
	$(RUN) train configs/demo.yaml
	$(RUN) evaluate runs/demo
	$(RUN) report runs/demo

test: setup  ## Run the tests
	.venv/bin/python $(TESTS)

test-faults: setup  ## Interrupt, damage and starve runs, and count what is lost
	.venv/bin/python -m pytest tests/faults -m '' --numprocesses auto --maxprocesses 2 --dist worksteal

coverage: setup  ## Run them all, and say which lines of the project none of them reaches
	.venv/bin/coverage erase
	.venv/bin/coverage run $(TESTS) --timeout 1200
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report --skip-covered --show-missing --fail-under=90

tools: setup
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[lint,docs]'

lint: tools  ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet --exclude "*.md" .
	scripts/types.sh

docs: tools  ## Build the documentation: build/site/index.html
	.venv/bin/python scripts/config_reference.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

clean:  ## Remove what was made: data, runs, caches (.venv stays)
	rm -rf build data runs .pytest_cache .hypothesis .ruff_cache .mypy_cache
