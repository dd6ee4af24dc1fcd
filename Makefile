# Needs only make and Python 3.11 or later. Every target first makes .venv, once.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PYTHON ?= python3.11 python3

# By default glibc gives large buffers back to the system as soon as they are freed, and the next
# one is page-faulted in again: every batch and every candidate pays for it. With these thresholds
# the process keeps its memory, which about halves training time. They do nothing on macOS.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456

.DEFAULT_GOAL := help
.PHONY: help demo test lab app bench results check notebooks screenshots assignments grade clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## search the scales of the embedded network and show the gain
	$(KEEP_MEMORY) $(PY) -m evolq_lite demo --replace

test: $(STAMP) ## ruff, mypy and pytest
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(KEEP_MEMORY) $(PY) -m pytest

lab: $(STAMP) ## open the lessons in JupyterLab
	$(KEEP_MEMORY) $(PY) -m jupyter lab notebooks/00_start_here.ipynb

app: $(STAMP) ## show lesson 6 without its code in a browser, live (Voila)
	$(KEEP_MEMORY) JUPYTER_PATH=notebooks/app $(PY) -m voila --template=offline --progressive_rendering=True \
	  notebooks/06_blockwise_evolq.ipynb

bench: $(STAMP) ## measure the cost of one candidate
	$(KEEP_MEMORY) $(PY) benchmarks/candidate_cost.py

results: $(STAMP) ## figures and tables of data/results from its JSON files
	$(PY) -m evolq_lite reproduce --report

check: $(STAMP) ## say whether this machine is ready, and what to do if not
	$(PY) -m evolq_lite check

notebooks: $(STAMP) ## make notebooks/*.ipynb from notebooks/src/*.py
	$(KEEP_MEMORY) $(PY) notebooks/build.py

screenshots: $(STAMP) ## take a picture of every panel, in notebooks/images (needs Chromium)
	$(KEEP_MEMORY) $(PY) notebooks/screenshots.py

assignments: $(STAMP) ## make the student releases in notebooks/assignments/release
	$(KEEP_MEMORY) $(PY) notebooks/assignments/build.py

grade: $(STAMP) ## grade SUBMISSIONS=DIR into OUT=DIR, with other hidden tests from OVERLAY=DIR
	@test -n '$(SUBMISSIONS)' && test -n '$(OUT)' || { \
	  echo 'make grade SUBMISSIONS=DIR OUT=DIR [OVERLAY=DIR]' >&2; exit 2; }
	$(KEEP_MEMORY) $(PY) notebooks/assignments/grade.py '$(SUBMISSIONS)' '$(OUT)' \
	  $(if $(OVERLAY),--overlay '$(OVERLAY)')

clean: ## remove caches and build leftovers (keeps .venv, runs/ and data/)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The stamp is touched last: an install that was stopped is taken up again, and a finished one is
# repeated only after a change of the two files. setuptools is in the lock, so the package itself
# is built with it (--no-build-isolation) and not with one fetched for the purpose.
$(STAMP): requirements.lock pyproject.toml
	@found=; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHON); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'Python 3.11 or later was not found: install it, or name it with make PYTHON=/path/to/python3.' >&2; exit 1; \
	  fi; \
	  echo "$$found -m venv $(VENV)"; \
	  $$found -m venv --clear $(VENV) || { \
	    echo 'The environment .venv could not be made (on Debian and Ubuntu, install python3-venv first).' >&2; exit 1; }; \
	fi
	$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
