# Each target creates its environment in .venv (`make floor`: in .venv-floor). Variables for the command line:
#
#   TORCH        pip arguments to install torch. The default is a version that is known to pass the tests.
#                For a build without CUDA:
#                make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#   PYTHON       the interpreter for creating the environments
#   ARGS         arguments of `make demo`, `make knowledge`, `make knowledge-variants`, `make knowledge-fusions`
#                and `make bench`
#   CORPORA      the folder with the corpora of `make knowledge`; see docs/knowledge.md
#   PYTEST_ARGS  additional arguments of pytest, e.g. PYTEST_ARGS="-k config -x"
#   JOBS         the number of test processes
#
# TORCH and PYTHON are only used when an environment is created: run `make clean` before changing them.

PYTHON ?= python3
TORCH ?= torch==2.13.0
FLOOR_TORCH ?= torch==2.6.0
JOBS ?= 2
ARGS ?=
CORPORA ?= ../shared/data
PYTEST_ARGS ?=

VENV := .venv
FLOOR := .venv-floor
# Top-level folders installed as kadapter_hf.<folder>.
MAPPED := conversion modeling

# Environment of every test run: no network, and one thread for each parallel process.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
RUN_ENV := TOKENIZERS_PARALLELISM=false
PIP_ENV := PIP_DISABLE_PIP_VERSION_CHECK=1

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv versions demo knowledge knowledge-variants knowledge-fusions test slow quantization conformance lint bench \
	docs docs-serve floor dist clean

help:
	@echo "make demo      train adapters on a small model and demonstrate them (ARGS=... is passed to the script)"
	@echo "make knowledge train adapters on real corpora and evaluate them (CORPORA=folder)"
	@echo "make knowledge-variants  train and compare fifteen variants of the factual adapter"
	@echo "make knowledge-fusions   compare fusions with the factual adapter of make knowledge"
	@echo "make test      run the tests except those marked slow or cuda"
	@echo "make slow      run the tests marked slow, the notebooks, and the tests of make quantization and make conformance"
	@echo "make quantization  run the tests of quantised backbones, with torchao and bitsandbytes"
	@echo "make conformance  run the common tests of transformers on every class"
	@echo "make lint      run ruff and mypy"
	@echo "make bench     run each script in benchmarks/"
	@echo "make docs      build the documentation site in build/site"
	@echo "make docs-serve  show it at http://127.0.0.1:8000, and again after each change"
	@echo "make floor     run the tests with the oldest supported version of each dependency"
	@echo "make dist      build the source distribution and the wheel in dist/, and check them"
	@echo "make clean     remove environments, build artifacts and caches"

# Each finished step is marked by a stamp file. torch is installed first and separately, so that a CPU build
# satisfies the requirements of later packages.
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
# torch is set by FLOOR_TORCH. Indirect dependencies are not pinned.
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

knowledge-fusions: $(VENV)/.installed
	$(RUN_ENV) $(VENV)/bin/python examples/knowledge_fusions.py --data $(CORPORA) --factual knowledge-output/factual \
		--linguistic knowledge-output/linguistic $(ARGS)
	cp knowledge-output/fusions/fusion-results.md docs/

# A file's tests run in one process, as many share what a fixture of their module has made.
test: $(VENV)/.installed
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# Ray is large and only needed by one slow test.
$(VENV)/.ray: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet "datatrove[ray]"
	@touch $@

$(VENV)/.dist: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet -e ".[dist]"
	@touch $@

# Chromium, from the system's packages, and what drives it.
$(VENV)/.browser: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet -e ".[browser]"
	command -v chromium > /dev/null || apt-get install --yes --quiet chromium
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet -e ".[docs,notebooks]"
	@touch $@

# Warnings are errors, and nothing is downloaded.
docs: $(VENV)/.docs
	$(TEST_ENV) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(TEST_ENV) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs serve

# PYTEST_ARGS is for the slow tests: what they select may be nothing among those of conformance.
slow: $(VENV)/.ray $(VENV)/.browser $(VENV)/.docs $(VENV)/.dist
	$(TEST_ENV) FUZZ_EXAMPLES=400 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not cuda" \
		$(PYTEST_ARGS)
	$(MAKE) quantization PYTEST_ARGS=
	$(MAKE) conformance PYTEST_ARGS=

# torchao and bitsandbytes slow down every import of transformers, so they are installed beside the environment.
$(VENV)/quantization: $(VENV)/.installed
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet --no-deps --target $@ torchao bitsandbytes

quantization: $(VENV)/quantization
	$(TEST_ENV) PYTHONPATH=$(CURDIR)/$(VENV)/quantization $(VENV)/bin/python -m pytest -m "slow and not cuda" \
		tests/modeling/test_quantized_backbones.py $(PYTEST_ARGS)

# The tests of the installed version of transformers, which are downloaded once.
$(VENV)/.conformance: $(VENV)/.installed tests/conformance/prepare.py
	$(PIP_ENV) $(VENV)/bin/python -m pip install --quiet -e ".[conformance]"
	$(PIP_ENV) $(VENV)/bin/python tests/conformance/prepare.py $(VENV)/conformance
	@touch $@

# Without pytest's options in pyproject.toml, as these tests have markers of their own, and warn a lot.
conformance: $(VENV)/.conformance
	$(TEST_ENV) TRANSFORMERS_TESTS=$(CURDIR)/$(VENV)/conformance $(VENV)/bin/python -m pytest -n $(JOBS) \
		-o addopts= -q --disable-warnings --show-capture=no tests/conformance $(PYTEST_ARGS)

floor: $(FLOOR)/.installed
	$(TEST_ENV) $(FLOOR)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# mypy can't follow the import hook of an editable install, so the installed layout is recreated with symbolic links.
lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/kadapter_hf
	@ln -s $(filter-out %/cli,$(wildcard $(CURDIR)/kadapter_hf/*)) $(MAPPED:%=$(CURDIR)/%) build/typing/kadapter_hf/
	@ln -s $(CURDIR)/kadapter_hf/cli build/typing/kadapter_cli
	cd build/typing && $(CURDIR)/$(VENV)/bin/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p kadapter_hf -p kadapter_cli

# Files whose names start with an underscore are helpers.
BENCHES := $(filter-out benchmarks/_%,$(sort $(wildcard benchmarks/*.py)))
bench: $(VENV)/.installed
	@set -e; for bench in $(BENCHES); do \
		echo "== $$bench"; $(RUN_ENV) $(VENV)/bin/python $$bench $(ARGS); \
	done

# The slow tests also install the wheel, without any extra, and run it.
dist: $(VENV)/.dist
	rm -rf dist
	$(PIP_ENV) $(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
