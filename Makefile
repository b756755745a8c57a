# zerolab: every target makes its own virtual environment first; nothing needs sudo or an activated environment.
PYTHON ?= python3
# Where pip looks for torch besides the usual index. CPU-only wheels (0.2 GB, not 3 GB):
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.zerolab-installed
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-engines docs readme lab notebooks clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything, pinned (quick when nothing changed)

quickstart: $(STAMP) ## shapes, training and a reconstruction in minutes, left under runs/quickstart/
	$(BIN)/zerolab run nbs/experiments/quickstart.ipynb -p objects 256 -p train_minutes 4 -p test_objects 16 -p workers 2 -p picture_size 128

test: $(STAMP) ## run every check: export, clean, notebooks, documentation, tests
	@tests/run_checks.sh

test-engines: $(STAMP) ## run the slow tests of jobs: SLURM, Ray, killed drivers, overhead; results go into data/results/
	$(BIN)/python -m pytest tests/test_jobs_engines.py tests/test_jobs_sweep.py tests/test_jobs_launch.py --run-slow

docs: $(STAMP) ## build the documentation site in _site/
	$(BIN)/python -m zerolab.dev.site build

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(BIN)/python -m zerolab.dev.site readme

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

notebooks: $(STAMP) ## execute again the notebooks whose code changed since their last run
	$(BIN)/python -m zerolab.dev.notebooks run

clean: ## remove what can be made again (keeps .venv, data and runs)
	rm -rf _proc _site _sitesrc _sitesrc.yml _docs nbs/sidebar.yml build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find nbs tests zerolab \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "zerolab needs Python 3.11 or newer, and '$(PYTHON)' was not found. Try: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "zerolab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv. Then: make setup"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): a few minutes the first time."
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs]'
	@touch $@
