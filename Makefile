# Every command of the project; `make help` lists them. All of them work from a
# fresh clone: what is missing (.venv, packages, base models, data) is set up first.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

# The first of these that is Python 3.11 or newer creates .venv.
# To choose one yourself: make lab PYTHONS=python3.12
PYTHONS := python3 python3.13 python3.12 python3.11 python3.14 python

# pip works inside .venv or not at all, whatever the user's own settings say.
export PIP_REQUIRE_VIRTUALENV := 1
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help lab test run test-notebooks test-colab test-browser results results-chapters notebooks badges classroom pictures bench setup clean

help:
	@echo "make lab              set up, then open the course in JupyterLab"
	@echo "make test             set up, then run the tests"
	@echo "make run NB=05        run one notebook without a browser; writes an HTML with its outputs"
	@echo "make test-notebooks   run every notebook, student's and solution, in the smoke profile"
	@echo "make test-colab       run notebooks as Colab would: without this checkout, beside its own torch"
	@echo "make test-browser     run notebooks in JupyterLab, in a browser; screenshots in build/browser"
	@echo "make results          the one comparison: measure what is missing of it (about three hours in all)"
	@echo "make results-chapters the chapters' own tables again, cpu profile (about two hours)"
	@echo "make notebooks        build the notebooks from notebooks/source"
	@echo "make badges REPO=owner/name   where the course is published, into every notebook"
	@echo "make classroom        the student notebooks without solutions, to hand out: build/minipeft-classroom.zip"
	@echo "make pictures         README's pictures and its table of the comparison, drawn anew"
	@echo "make bench            time and memory beside Hugging Face PEFT and bitsandbytes"
	@echo "make setup            set up only: .venv, packages, base models, data"
	@echo "make clean            remove .venv and everything built; the model cache stays"

.PHONY: environment
environment:
	@found=; \
	for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "minipeft needs Python 3.11 or newer with its venv module; none of these is one: $(PYTHONS)." >&2; \
	  echo "Install it (on Debian and Ubuntu with the package python3-venv), or name it: make PYTHONS=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)

# Runs again only when the dependencies have changed, or when the environment's Python
# does not run (there is none yet, or the Python it was made with has gone).
$(INSTALLED): pyproject.toml constraints.txt $(if $(shell $(PYTHON) -c 'print(1)' 2>&1 | grep -x 1),,environment)
	@echo "Installing into $(VENV). The first time takes minutes; torch is the largest part."
	$(PYTHON) -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(PYTHON) -m pip install --constraint constraints.txt --editable ".[notebooks,test]"
	@touch $@

setup: $(INSTALLED)
	$(PYTHON) -m minipeft.fetch

# Without a display JupyterLab prints the address to open elsewhere.
lab: setup
	@browser=; root=; \
	if [ "$$(uname)" != Darwin ] && [ -z "$$DISPLAY$$WAYLAND_DISPLAY" ]; then \
	  browser=--no-browser; \
	  echo "No display here. Open the address below in a browser; Ctrl-C stops JupyterLab."; \
	fi; \
	if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; \
	exec $(PYTHON) -m jupyterlab $$browser $$root --ServerApp.root_dir=. \
	  --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

# Two workers of one thread each are faster than one of two: most of these models are tiny.
test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile

run: $(if $(NB),setup,name-a-notebook)
	$(PYTHON) notebooks/tools.py run $(NB)

.PHONY: name-a-notebook
name-a-notebook:
	@echo "Which notebook? For example: make run NB=05" >&2; exit 2

test-notebooks: setup
	$(PYTHON) notebooks/tools.py test

# Two workers, each with an environment of its own that looks like Colab's.
test-colab: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 tests/run_colab.py

test-browser: setup $(VENV)/installed-browser
	$(PYTHON) -m pytest -q tests/run_browser.py

$(VENV)/installed-browser: $(INSTALLED)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	@touch $@

# Goes on where it was stopped. For a part of it: .venv/bin/python notebooks/compare.py --list
results: setup
	$(PYTHON) notebooks/compare.py
	$(PYTHON) notebooks/pictures.py

results-chapters: setup
	$(PYTHON) notebooks/tools.py results

notebooks: $(INSTALLED)
	$(PYTHON) notebooks/tools.py build

badges: $(if $(REPO),$(INSTALLED),name-a-repository)
	$(PYTHON) notebooks/tools.py badges '$(subst ','\'',$(REPO))'

.PHONY: name-a-repository
name-a-repository:
	@echo "Which repository? As on GitHub: make badges REPO=owner/name" >&2; exit 2

classroom: $(INSTALLED)
	$(PYTHON) notebooks/classroom.py

pictures: $(INSTALLED)
	$(PYTHON) notebooks/pictures.py

bench: setup
	$(PYTHON) tests/bench.py
	$(PYTHON) tests/bench_gpu.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis
	find minipeft tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
