# Every target does its own set-up, in .venv (`make floor`: in .venv-floor). Variables to set on the command line:
#
#   TORCH        what pip installs for torch, options included. The default is a version the tests are known to
#                pass with. For a build without CUDA:
#                make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#   PYTHON       the interpreter the environments are made from
#   ARGS         arguments of `make demo`, `make knowledge`, `make knowledge-variants` and `make bench`
#   CORPORA      the folder of real corpora that `make knowledge` learns from; docs/knowledge.md says which
#   PYTEST_ARGS  further arguments of pytest, for instance PYTEST_ARGS="-k config -x"
#   JOBS         the number of processes the tests run in
#
# TORCH and PYTHON count when an environment is made: `make clean` first to change them.

PYTHON ?= python3
TORCH ?= torch==2.13.0
FLOOR_TORCH ?= torch==2.6.0
JOBS ?= 2
ARGS ?=
CORPORA ?= ../shared/data
PYTEST_ARGS ?=

VENV := .venv
FLOOR := .venv-floor
# The top-level folders that are installed as kadapter_hf.<folder>.
MAPPED := conversion modeling

# What every test run sets: no network, and one thread for each process that runs side by side.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
RUN_ENV := TOKENIZERS_PARALLELISM=false
PIP_ENV := PIP_DISABLE_PIP_VERSION_CHECK=1

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv versions demo knowledge knowledge-variants test slow lint bench floor clean

help:
	@echo "make demo      train adapters on a small model and show what they do (ARGS=... is passed on)"
	@echo "make knowledge train adapters on real corpora and measure what they are worth (CORPORA=folder)"
	@echo "make knowledge-variants  train the factual one in fifteen ways, to see what matters"
	@echo "make test      the tests, without those marked slow or cuda"
	@echo "make slow      the tests marked slow"
	@echo "make lint      ruff and mypy"
	@echo "make bench     every script in benchmarks/"
	@echo "make floor     the tests, with the oldest supported version of each dependency"
	@echo "make clean     remove environments, build products and caches"

# A stamp file stands for each finished step. torch comes first and alone, so that a CPU build stays
# the one that satisfies everything installed after it.
$(VENV)/.torch:
	$(PYTHON) -m venv --clear $(VENV)
	torch='$(TORCH)'; $(PIP_ENV) $(VENV)/bin/python -m pip install --quiet $$torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.cfg
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet -e ".[test,demo]"
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet -e ".[lint]"
	@touch $@

$(FLOOR)/.torch:
	$(PYTHON) -m venv --clear $(FLOOR)
	torch='$(FLOOR_TORCH)'; $(PIP_ENV) $(FLOOR)/bin/python -m pip install --quiet $$torch
	@touch $@

# The floors are read from setup.cfg, from install_requires and the peft extra: NAME>=X becomes NAME==X.
# torch is left to FLOOR_TORCH. What those packages need themselves is not pinned.
$(FLOOR)/.installed: $(FLOOR)/.torch setup.cfg
	sed -n -E '/^(install_requires|peft) =/,/^[^ ]/s/^ +([A-Za-z0-9._-]+)>=([0-9.]+)$$/\1==\2/p' setup.cfg \
		| grep -v '^torch==' > $(FLOOR)/constraints.txt
	$(PIP_ENV) $(FLOOR)/bin/python -m pip install --quiet -c $(FLOOR)/constraints.txt -e ".[test,demo]"
	@touch $@

venv: $(VENV)/.installed

versions: $(VENV)/.installed
	@$(VENV)/bin/python -VV
	@$(VENV)/bin/python -m pip list --disable-pip-version-check 2>/dev/null | grep -iE \
		'^(torch|transformers|tokenizers|huggingface.hub|safetensors|accelerate|datasets|peft|numpy|pytest|kadapter-hf) '

demo: $(VENV)/.installed
	$(RUN_ENV) $(VENV)/bin/python examples/demo.py $(ARGS)

knowledge: $(VENV)/.installed
	$(RUN_ENV) $(VENV)/bin/python examples/knowledge.py --data $(CORPORA) --output_dir knowledge-output $(ARGS)
	cp knowledge-output/results.md knowledge-output/results.png docs/

knowledge-variants: $(VENV)/.installed
	$(RUN_ENV) $(VENV)/bin/python examples/knowledge_variants.py --data $(CORPORA) $(ARGS)
	cp knowledge-output/variants/variants.md docs/

# A file's tests run in one process, as many share what a fixture of their module has made.
test: $(VENV)/.installed
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# Ray, too large for each test run, is for one slow test.
$(VENV)/.ray: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet "datatrove[ray]"
	@touch $@

slow: $(VENV)/.ray
	$(TEST_ENV) FUZZ_EXAMPLES=400 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not cuda" \
		$(PYTEST_ARGS)

floor: $(FLOOR)/.installed
	$(TEST_ENV) $(FLOOR)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# mypy can't follow the import hook of an editable install, so it gets the installed layout as a tree of links.
lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/kadapter_hf
	@ln -s $(CURDIR)/kadapter_hf/* $(MAPPED:%=$(CURDIR)/%) build/typing/kadapter_hf/
	cd build/typing && $(CURDIR)/$(VENV)/bin/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p kadapter_hf

# A file whose name starts with an underscore is a helper of the others.
BENCHES := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))
bench: $(VENV)/.installed
	@set -e; for bench in $(BENCHES); do \
		echo "== $$bench"; $(RUN_ENV) $(VENV)/bin/python $$bench $(ARGS); \
	done

clean:
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
