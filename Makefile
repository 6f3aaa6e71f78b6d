# `make quickstart` runs the main job, `make test` the tests, `make test-slurm` those on a real SLURM; each creates .venv first if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slurm gpu-check lint docs install clean

quickstart: $(STAMP)
	$(BIN)/torchrl-sql quickstart --jobs 2

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Two nodes of a real SLURM on this host, from Debian's packages; nothing is started as a service.
test-slurm: $(STAMP)
	tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm

# On a machine with a GPU, ten minutes: benchmarks/results/gpu_check_NAME.md. No network is needed once .venv is there.
gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site: docs/_build/html/index.html.
docs: $(STAMP)
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py torchrl_sql/data/gather.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
