# make demo    compares ProMoT and standard fine-tuning on a real model and real data; SEEDS="0 1 2" for several seeds
# make test    the fast tests, and those on the real model and data
# make test-slow     thousands of damaged files, killed hosts, every variant; SLOW="tests/distributed/test_hosts.py" runs a part
# make test-libtpu   the TPU compiler on a machine without a TPU
# make test-browser  the report in headless Chromium, which you install first (tests/report/page/test_in_browser.py)
# make findings   the report of the study in docs/findings, from its results: no model is loaded, nothing is run
# make bench   benchmarks against PyTorch and lm-eval, hours; BENCH="step_stage1 icl_eval" runs a part; docs/performance.md
# make docs    the documentation as a site, in runs/site; a warning is an error
# make check   style, types, the direction of imports, and shell scripts
#
# Each target first makes what it needs: .venv, the packages, the demo's model and data. All of them are incremental.

PYTHON ?= python3
SEEDS ?=
SLOW ?=
BENCH ?=
# Two workers suit two cores; a file's tests stay together, since they share fixtures. tests/conftest.py orders the files.
PYTEST_FLAGS ?= -q -n 2 --dist loadfile --no-loadscope-reorder

# Images of containers often set it: then every process that a test starts would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --no-input
STAMPS := $(VENV)/stamps
comma := ,
space := $(subst ,, )
seeds := $(if $(strip $(SEEDS)),"--gin.SEEDS=[$(subst $(space),$(comma),$(strip $(SEEDS)))]")

.PHONY: demo test test-slow test-libtpu test-browser findings bench docs check format assets clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(STAMPS)/demo assets
	$(RUN) -m promot_jax.main --gin_file=demo.gin $(seeds)

test: $(STAMPS)/test assets
	$(RUN) -m pytest $(PYTEST_FLAGS) -m "not slow and not browser and not libtpu"

test-slow: $(STAMPS)/test assets
	$(RUN) -m pytest $(PYTEST_FLAGS) -o faulthandler_timeout=3600 -m slow $(SLOW)

# libtpu reads XLA_FLAGS too, and ends the process for the one that makes the other tests compile fast.
test-libtpu: $(STAMPS)/libtpu
	JAX_PLATFORMS=cpu XLA_FLAGS= $(RUN) -m pytest -q -m libtpu

test-browser: $(STAMPS)/test
	$(RUN) -m pytest -q -m browser

findings: $(STAMPS)/demo
	$(RUN) -m promot_jax.main --gin_file=studies/frontier.gin --gin.RUN_CELLS=False

bench: $(STAMPS)/bench assets
	$(RUN) -m benchmarks $(BENCH)

# The variable silences what the theme prints about its own future.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

check: $(STAMPS)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/shellcheck -x launch/*.sh .ci/run

format: $(STAMPS)/dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Takes a moment when the files are there.
assets: $(STAMPS)/demo
	$(RUN) -m promot_jax.assets

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed (TensorFlow Text has no wheel for others) and $(PYTHON) is none of" \
	    "them: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/venv setup.py pyproject.toml
	$(PIP) -e ".[demo]"
	@touch $@

# torch comes first, with an exact version: together with the rest, pip may choose a build for accelerators.
$(STAMPS)/test: $(STAMPS)/demo
	$(PIP) torch==2.13.0
	$(PIP) -e ".[test]"
	@touch $@

$(STAMPS)/libtpu: $(STAMPS)/test
	$(PIP) -e ".[precompile]"
	@touch $@

$(STAMPS)/bench: $(STAMPS)/test
	$(PIP) -e ".[bench]"
	@touch $@

$(STAMPS)/docs: $(STAMPS)/demo
	$(PIP) -e ".[docs]"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/demo
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Keeps runs/ and the downloaded model and data.
distclean: clean
	rm -rf $(VENV)
