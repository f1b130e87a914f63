# make demo and make test do their own set-up; nothing else to know.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test check fix audit constraints requirements

help:  ## Show the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Make .venv with pinned versions, once.

$(READY): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=26'  # older ones take minutes to resolve
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export,demo,dev]'
	touch $@

demo: $(READY)  ## Run every kind of job over sample tables with the real Gemma 3 270M.
	$(BIN)/python -m examples.demo

test: check  ## Set up, then run every check and test.

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

fix: $(READY)  ## Format the code and repair what ruff can.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

audit: $(READY)  ## Compare the pinned versions with known vulnerabilities.
	$(BIN)/python -m templates.audit

constraints: $(READY)  ## Write down the versions that are installed now.
	{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt

requirements: $(READY)  ## Lock what images install, from the versions in constraints.txt.
	for device in cpu gpu; do templates/lock.sh $$device || exit; done
