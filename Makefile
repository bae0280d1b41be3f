# Everything from a fresh clone; the only prerequisite is Python 3.10 or newer.
#   make demo    train on a synthetic object on this machine; writes mesh, video, pictures and metrics
#   make test    the test suite            make check   ruff and mypy
#   make nightly  train the smallest config again and compare with benchmarks/results
#   make bench   the measurements that the README reports
#   make clean   remove .venv and caches; inputs/ and outputs/ stay
# PYTHON=python3.12 chooses an interpreter. TORCH_INDEX=URL (or empty) chooses where PyTorch may come from besides PyPI.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$python" && break; done)
RUN := .venv/bin/python

# PyPI's PyTorch for Linux brings gigabytes of CUDA libraries along. Where there is no NVIDIA GPU, the same version
# comes from PyTorch's own index for CPUs, if that answers; pip prefers it, because +cpu counts as newer.
TORCH_INDEX ?= $(shell [ "$$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ] && "$(PYTHON)" -c \
	'import urllib.request as u; u.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=3)' 2>/dev/null && echo $(TORCH_CPU_INDEX))
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test nightly check bench clean

help:
	@sed -n 's/^#   //p' Makefile

.venv/.installed: requirements.lock
	@[ -n "$(PYTHON)" ] || { echo "make: Python 3.10 or newer is needed; install it, or say make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv with $$("$(PYTHON)" --version); once, a few minutes (PyTorch is large) ..."
	@"$(PYTHON)" -m venv .venv || { echo "make: $(PYTHON) cannot make a .venv; install its venv package (python3-venv)"; exit 1; }
	@index="$(TORCH_INDEX)"; $(RUN) -m pip install -qq --disable-pip-version-check \
		$${index:+--extra-index-url "$$index"} -r requirements.lock
	@touch $@

demo: .venv/.installed
	@$(RUN) run.py --config confs/neus-synthetic.yaml --train --test
	@save=$$(ls -td outputs/*/*/save | head -n 1); echo; echo "The demo's results:"; \
	for file in "$$save"/*.ply "$$save"/*.mp4 "$$save"/test "$$save"/val "$$save"/metrics.json; do \
		[ ! -e "$$file" ] || echo "  $(CURDIR)/$$file"; done

# The kernels for GPUs are tested without one, in Triton's interpreter. `make demo` has no use for its 200 MB.
.venv/.testable: .venv/.installed tests/requirements.lock
	@$(RUN) -m pip install -qq --disable-pip-version-check -r tests/requirements.lock
	@touch $@

# Two at a time: the suite is mostly single-threaded, and every machine has two cores.
test: .venv/.testable
	@$(RUN) -m pytest -n 2

nightly: .venv/.testable
	@$(RUN) -m pytest -m nightly tests/test_quality_benchmark.py

check: .venv/.testable
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: .venv/.installed
	@$(RUN) benchmarks/throughput.py && $(RUN) benchmarks/openmp.py && $(RUN) benchmarks/quality.py demo

clean:
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
