# Needs only make and Python 3.11.5 or later. Every target first creates .venv, once.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PYTHON ?= python3.11 python3

# An OpenMP thread that waits at a barrier spins instead of sleeping. If another process has its core,
# the thread it waits for gets no time: with one other busy process on two cores, a candidate of the
# search takes 5.0 s instead of 0.05. With a bounded spin it takes 0.15 s (and 0.053 s when idle).
# The first variable is GNU's (Linux), the second LLVM's and Intel's (macOS, some builds of torch).
# They are read when torch is loaded. A value that you set yourself wins, and so does OMP_WAIT_POLICY.
ifndef OMP_WAIT_POLICY
GOMP_SPINCOUNT ?= 2000
KMP_BLOCKTIME ?= 1
export GOMP_SPINCOUNT KMP_BLOCKTIME
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lab app site bench results docs check notebooks screenshots assignments grade clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## evolve the scales of the embedded network and show the gain
	$(PY) -m evolq_lite demo --replace

# Tests in as many processes as there are processors, four at most: each takes a gigabyte.
test: $(STAMP) ## run ruff, mypy and pytest
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: $(STAMP) ## open the lessons in JupyterLab
	$(PY) -m jupyter lab notebooks/00_start_here.ipynb

app: $(STAMP) ## serve the panel of lesson 6 alone, as a live page (Voila)
	JUPYTER_PATH=notebooks/app $(PY) -m voila --template=offline --progressive_rendering=True \
	  notebooks/app/search.ipynb

bench: $(STAMP) ## measure the cost of one candidate
	$(PY) benchmarks/candidate_cost.py

results: $(STAMP) ## redraw the figures and tables in data/results from the stored results
	$(PY) -m evolq_lite reproduce --report

site: $(STAMP) ## build the course as a web site in build/site/html
	$(PY) docs/site/build.py

docs: $(STAMP) ## rewrite the generated tables in README.md and docs/
	$(PY) docs/build.py

check: $(STAMP) ## check that this machine is ready, and say what to do if not
	$(PY) -m evolq_lite check

notebooks: $(STAMP) ## build notebooks/*.ipynb from notebooks/src/*.py
	$(PY) notebooks/build.py

screenshots: $(STAMP) ## save a picture of every panel to notebooks/images (needs Chromium)
	$(PY) notebooks/screenshots.py

assignments: $(STAMP) ## build the student releases in notebooks/assignments/release
	$(PY) notebooks/assignments/build.py

grade: $(STAMP) ## grade SUBMISSIONS=DIR_OR_ZIP into OUT=DIR (also ROSTER=, OVERLAY=, REPAIRED=)
	@test -n '$(SUBMISSIONS)' && test -n '$(OUT)' || { \
	  echo 'make grade SUBMISSIONS=DIR_OR_ZIP OUT=DIR [ROSTER=FILE] [OVERLAY=DIR] [REPAIRED=DIR]' >&2; exit 2; }
	$(PY) notebooks/assignments/grade.py '$(SUBMISSIONS)' '$(OUT)' \
	  $(if $(ROSTER),--roster '$(ROSTER)') $(if $(OVERLAY),--overlay '$(OVERLAY)') \
	  $(if $(REPAIRED),--repaired '$(REPAIRED)')

clean: ## remove caches and build leftovers (keeps .venv, runs/ and data/)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The stamp is touched last: an interrupted install is resumed, and a finished one is repeated only
# after one of the two files has changed. setuptools is in the lock, so the package itself is built
# with it (--no-build-isolation) and not with one downloaded for the purpose.
$(STAMP): requirements.lock pyproject.toml
	@found=; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHON); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'Python 3.11.5 or later was not found: install it, or name it with make PYTHON=/path/to/python3.' >&2; exit 1; \
	  fi; \
	  echo "$$found -m venv $(VENV)"; \
	  $$found -m venv --clear $(VENV) || { \
	    echo 'The environment .venv could not be created (on Debian and Ubuntu, install python3-venv first).' >&2; exit 1; }; \
	fi
	$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
