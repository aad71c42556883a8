# w2vc: two commands do everything on a machine that has Python and make.
#   make book    read: execute every chapter and build the site _book/index.html
#   make test    check: lint, types, tests, chapters, site
PYTHON   ?= python3
JOBS     ?= 2
BIN      := .venv/bin
STAMP    := .venv/.installed
PACKAGE  := $(shell find w2vc -name '*.py')
DATA     := $(shell find w2vc/assets -type f 2>/dev/null)
CHAPTERS := $(shell find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' | sort)
RUN      := _build/executed$(if $(W2VC_SPEECH),-$(W2VC_SPEECH))
EXECUTED := $(patsubst nbs/%.ipynb,$(RUN)/%.ipynb,$(CHAPTERS))
EXPORT   := $(BIN)/nbdev-export && $(BIN)/ruff check -q --fix --select I w2vc && $(BIN)/ruff format -q w2vc
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH

STARTED := $(shell date +%s)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## what can be made
	@echo "w2vc: Wav2Vec2-Conformer from scratch. Start with one of these:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "w2vc needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@echo "== Installing into .venv (about three minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	@touch $@

install: $(STAMP) ## create .venv with everything the book, the tests and JupyterLab need
	@echo "Installed. Next: make book (read), make lab (run), make test (check)"

# A chapter runs again when its notebook, any file of w2vc/ or the data is newer.
$(RUN)/%.ipynb: nbs/%.ipynb $(PACKAGE) $(DATA) docs/execute.py | $(STAMP)
	@$(BIN)/python docs/execute.py $< --out $@

executed: $(STAMP) ## execute every chapter whose copy in _build/executed is stale
	@echo "== Executing the chapters and solutions that are out of date ($(words $(EXECUTED)) in all, $(JOBS) at a time)"
	@$(MAKE) -s --no-print-directory -k -j$(JOBS) $(EXECUTED)

book: executed ## execute every chapter and write the site
	@echo "== Building the site"
	@$(BIN)/python docs/build.py
	@echo "Done: open _book/index.html in a browser. Next: make lab to run the chapters yourself."

lab: $(STAMP) ## open the chapters in JupyterLab
	@echo "== JupyterLab opens nbs/. Start with 00_start.ipynb; stop with Ctrl-C."
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=nbs --LabApp.default_url=/lab/tree/00_start.ipynb

# The chapters run two at a time first; a chapter that fails here fails again, by name, in tests/book/test_programs.py.
PYTEST   := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
test: CHECK := $(PYTEST)
test: check ## run every check but the slow ones
test-all: CHECK := $(PYTEST) --slow
test-all: check ## run every check, the slow ones too

test-code: $(STAMP) ## check the package alone: no chapters, no site, no JupyterLab
	@$(PYTEST) --ignore tests/book --ignore tests/site --ignore tests/lab

bench: $(STAMP) ## measure README's rows of speed beside transformers (an hour)
	@$(BIN)/python -m benchmarks loss-8x10 step-4 mixed-8 utterance minutes-10 import --against transformers --threads 1 --json docs/benchmarks/cpu.json

check: $(STAMP)
	-@$(MAKE) --no-print-directory executed
	@echo "== Checking: export in sync, lint, types, package, notebooks, site"
	@$(CHECK)
	@echo "All of it took $$(($$(date +%s) - $(STARTED))) s. Next: make book to read it."

export: $(STAMP) ## write w2vc/ from the chapters
	@$(EXPORT) && $(BIN)/nbdev-clean

chapter: $(STAMP) ## after an edit: export, run and store one chapter (make chapter C=model/masking)
	@test -n "$(C)" || { echo "say which: make chapter C=model/masking"; exit 2; }
	@$(EXPORT)
	@$(BIN)/python docs/execute.py nbs/$(C).ipynb --inplace
	@$(BIN)/nbdev-clean --fname nbs/$(C).ipynb

readme: executed ## write the measured run times into the chapter table of README.md
	@$(BIN)/python docs/readme.py

lock: ## resolve constraints.txt anew (needs uv)
	@printf 'torch==2.13.0\n' > _build/pins.in
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate -c _build/pins.in -o constraints.txt

clean: ## remove what was built (not .venv)
	@rm -rf _build _book build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help install executed book lab test test-all test-code bench check export chapter readme lock clean
