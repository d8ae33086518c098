# The few commands that people type; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
# pip is the only tool that the environment needs; PIP_INDEX_URL and friends choose where packages come from.
STAMP := .venv/installed
# The libraries that flowcourse is timed beside live in an environment of their own.
BENCH_BIN := .venv-bench/bin
BENCH_STAMP := .venv-bench/installed
BENCH_OPTIONS ?= --compile --curves

.DEFAULT_GOAL := help
.PHONY: help env course lint fast check test test-deep test-matrix lab site site-serve prepare bench wheel clean

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP)  ## make the environment in .venv from constraints.txt
$(STAMP): constraints.txt settings.ini setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'flowcourse needs Python 3.11 or newer, found ' + sys.version.split()[0])"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

course: $(STAMP)  ## run the quick start, build the site, and say what was learned
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/course.py

# small matrices: processes gain more than threads
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical
DOCTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --doctest-modules flowcourse

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/check_clean
	$(BIN)/mypy

fast:  # of any environment: make fast BIN=.venv-3.13/bin
	$(PYTEST) --quiet tests/test_zoo.py tests/test_house.py -k "as_made or house"
	$(DOCTEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --nbval-lax --nbval-current-env nbs/01-change-of-variables.ipynb

check: lint fast  ## lint, types, exported code, the house, the zoo as made and one lesson, in two minutes

test: lint  ## check notebooks, exported code and tests
	$(PYTEST) --dist loadfile --nbval-lax --nbval-current-env nbs tests
	$(DOCTEST)
	$(BIN)/python tools/contract.py 12

test-deep: $(STAMP)  ## check the whole zoo with every set of kernels, for hours
	$(BIN)/python tools/contract.py

test-matrix:  ## check each Python on PATH, and the oldest packages
	$(PYTHON) tools/matrix.py

lab: $(STAMP)  ## open the lessons in JupyterLab
	$(BIN)/jupyter lab nbs

site: $(STAMP)  ## build the site into _docs
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/build_docs

site-serve: site  ## build the site and show it at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000

prepare: $(STAMP)  ## export the code, clean the notebooks, render README.md
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/prepare

bench: $(STAMP) $(BENCH_STAMP)  ## time flowcourse beside other libraries, and execute the page on it
	$(BENCH_BIN)/python benchmarks/run.py $(BENCH_OPTIONS)
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter nbconvert --to notebook --execute --inplace nbs/ref-speed.ipynb
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/prepare

$(BENCH_STAMP): benchmarks/requirements.txt constraints.txt settings.ini setup.py
	$(PYTHON) -m venv .venv-bench
	$(BENCH_BIN)/pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt --editable .
	touch $@

wheel: $(STAMP)  ## build the package into dist
	$(BIN)/python -m build

clean:  ## remove what the commands above made, but for the environment
	rm -rf _docs _proc _course _bench dist build
