# Everything is set up in .venv, once; it is redone when pyproject.toml changes.
# The recipes keep to what GNU make 3.81 knows, which macOS ships.

PYTHON ?= python3
# Used for torch only, on Linux without a GPU, when pip offers no CPU build of itself.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TEST_WORKERS ?= 2
CAPABILITY ?= 90
# of `make mini`: token shards made by `hsa data`, and where the run and its answers go
DATA ?=
MINI ?= runs/mini

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
DOCS := $(VENV)/.docs-installed

.DEFAULT_GOAL := help
.PHONY: help quickstart smol mini mini-data test lint report docs clean kernels-aot results/needles-nano

help:  ## show this list
	@echo "make quickstart   install into .venv and run the guided tour; the report lands in quickstart-report/"
	@echo "make test         install the development tools too, then ruff, mypy and the tests that need no GPU"
	@echo "make lint         ruff and mypy only"
	@echo "make smol         SmolLM2-135M with a memory: fetch it by pip (93 MB), apply our difference, ask a book"
	@echo "make mini         train mini on a GPU from DATA=SHARDS, then ask it: forms of recall at 64K, sentences in 1M tokens"
	@echo "make report       redraw every committed figure from the committed numbers, and docs/report.md with its PDF"
	@echo "make docs         build the documentation as a site into site/, without a warning and without the net"
	@echo "make results/needles-nano   measure the needle study again (4 minutes)"
	@echo "make kernels-aot  compile every variant of the Triton kernels (CAPABILITY=90, or 80,89); needs no GPU, but the extra \"kernels\""
	@echo "make clean        delete .venv, caches, build output and quickstart-report/"
	@echo "Options: PYTHON=python3.12 (3.10 to 3.13), TORCH_INDEX=URL, TEST_WORKERS=2, CAPABILITY=90, DATA=SHARDS, MINI=runs/mini"

quickstart: $(CORE)
	$(BIN)/hsa quickstart -o quickstart-report

test: lint
	@echo "tests: everything that needs neither a GPU nor much time"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -m "not gpu and not slow" -n $(TEST_WORKERS) --dist worksteal

lint: $(DEV)
	@echo "ruff: style and common mistakes"
	@$(BIN)/ruff check .
	@echo "mypy: types of the library (the first run takes a minute or two)"
	@$(BIN)/mypy

report: $(CORE)
	$(BIN)/hsa plot --all
	$(BIN)/python scripts/twins_report.py results/twins -o results/twins
	$(BIN)/python scripts/report.py
	$(BIN)/python scripts/draw_architecture.py

docs: $(DOCS)
	$(BIN)/python scripts/docs_site.py

smol: $(CORE)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python scripts/make_smol.py

mini-data:
	@test -n "$(DATA)" || { echo "make mini needs DATA=SHARDS, token shards made by \`hsa data TEXT... --tokenizer checkpoints/nano -o SHARDS\`"; exit 2; }

mini: mini-data $(CORE)
	$(BIN)/hsa train mini --data $(DATA) -o $(MINI)/run --device cuda --export $(MINI)/model
	$(BIN)/hsa eval $(MINI)/model --shards $(DATA) --device cuda --suite recall --lengths 64K --samples 50 --scoring both -o $(MINI)/recall
	$(BIN)/hsa eval needles --model $(MINI)/model --shards $(DATA) --device cuda --lengths 1M --needles 100 -o $(MINI)/needles

results/needles-nano: $(CORE)
	$(BIN)/hsa quickstart -o $@ --needles 100 --controls 40
	mv $@/report.json $@/summary.json && rm $@/needles.png

kernels-aot: $(CORE)
	TRITON_INTERPRET=0 $(BIN)/python -m hsa_ultralong.testing.aot --all --capability $(CAPABILITY) --jobs $(TEST_WORKERS)

clean:
	rm -rf $(VENV) site build dist *.egg-info quickstart-report .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hsa_ultralong tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(CORE): pyproject.toml setup.py scripts/bootstrap.py
	@$(CHECK_PYTHON)
	@"$(PYTHON)" scripts/bootstrap.py --venv $(VENV) --torch-index "$(TORCH_INDEX)"
	@touch $@

$(DEV): pyproject.toml setup.py scripts/bootstrap.py
	@$(CHECK_PYTHON)
	@"$(PYTHON)" scripts/bootstrap.py --venv $(VENV) --torch-index "$(TORCH_INDEX)" --extras dev
	@touch $(CORE) $@

# the site needs the core and the packages of the extra, which need nothing of ours
$(DOCS): $(CORE)
	@echo "installing the tools that build the site"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile --editable ".[docs]"
	@touch $@

CHECK_PYTHON = "$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	{ echo "Python 3.10 to 3.13 is needed; '$(PYTHON)' is not one. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
