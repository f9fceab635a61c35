# Verbs. `make demo` and `make test` do all their own set-up on a fresh machine.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# One thread a process: small models lose more to hand-offs than they win.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup setup-system demo federation test test-long test-docs test-all check format docs methods-measured results picture bench bench-privacy bench-aggregation bench-simulation bench-attacks bench-methods bench-deployment clean

help:               ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/ready  ## virtual environment with exact versions

# The stamp depends on what is installed, so a changed pin reinstalls.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup-system:       ## system packages that tests need (packages.txt)
	@packages=$$(grep -v '^#' packages.txt); \
	if [ -n "$$packages" ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $$packages; fi

demo: setup         ## six synthetic hospitals, private, with baselines: under two minutes
	gapweave simulate --baselines local,pooled,lr

federation: setup    ## a hub and four hospitals on hosts of their own (root: network namespaces)
	python tests/federation.py

test: setup         ## fast tests with branch coverage
	python -m pytest -n 2 -m "not long and not docs" --cov --cov-report=term

test-long: setup    ## kills, deployments, packaging, on a sample of their cases; EVERY=1 for all
	python -m pytest -m "long and measures"
	$(MAKE) -j 2 --output-sync=line test-federations test-rest

# Federations wait more than they work, so the rest runs beside them, and gives way.
.PHONY: test-federations test-rest
test-federations: setup
	python -m pytest -m "long and federation"
test-rest: setup
	nice python -m pytest -m "long and not measures and not federation"

test-docs: setup    ## every command of the documentation
	python -m pytest -n 2 --dist loadscope -m docs

test-all: check test test-docs test-long  ## everything

check: setup types  ## lint, types, import contract
	ruff check .
	ruff format --check .
	MYPYPATH=build/types mypy --namespace-packages --explicit-package-bases -p gapweave
	lint-imports

# mypy cannot follow the editable finder: give it the namespace as a folder of links.
.PHONY: types
types:
	@mkdir -p build/types/gapweave
	@for package in shared client server sites; do ln -sfn ../../../$$package build/types/gapweave/$$package; done

format: setup       ## apply lint fixes and formatting
	ruff check --fix .
	ruff format .

docs: setup         ## regenerate docs/reference.md and docs/methods.md
	python -m gapweave.shared.config.reference > docs/reference.md
	python -m gapweave.shared.catalogue docs > docs/methods.md

methods-measured: setup  ## docs/methods.json from RESULTS, the results.json of a comparison of methods on the demo
	python benchmarks/methods_measured.py $(RESULTS)

results: setup      ## is it worth joining? writes a section of docs/results.md (two hours and more; resumable)
	python benchmarks/results.py

picture: setup      ## make docs/privacy-report.png again (needs chromium)
	docs/privacy-report.sh

bench: bench-privacy bench-aggregation bench-simulation bench-attacks  ## all benchmarks

bench-privacy: setup  ## cost of a private step over a plain one
	python benchmarks/privacy.py

bench-aggregation: setup  ## cost of the aggregation rules over reading the updates
	python benchmarks/aggregation.py

bench-simulation: setup  ## cost of a simulated round over a plain loop
	python benchmarks/simulation.py

bench-attacks: setup  ## what a bad site costs the honest ones: writes docs/attacks.md (about an hour; resumable)
	python benchmarks/attacks.py

bench-methods: setup  ## ways of fusing, compared: a section of docs/results.md (half an hour; resumable)
	python benchmarks/methods.py
	python -m gapweave.shared.catalogue docs > docs/methods.md

bench-deployment: setup  ## cost of a deployed round over an inline one
	python benchmarks/deployment.py

clean:              ## remove what the verbs made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* .import_linter_cache
