# `make demo` and `make test` set up everything they need in .venv; only Python 3.11 or newer must be there.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

DATA ?= ../shared/data
QUERIES ?= 1000

.PHONY: install demo quality model test test-slurm mutants lint format docs release clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ping-llm needs Python 3.11 or newer, $(PYTHON) is older; say which to use: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots,cluster,baselines,serve,hf]'
	@touch $@

demo:
	@start=$$(date +%s); $(MAKE) --no-print-directory install && \
		$(VENV)/bin/python -m ping_llm.demo --install-s $$(($$(date +%s) - start))

# The model of the record and its evaluation, from the real dumps in DATA, on CPUs in hours. Repeated, it goes on.
quality:
	@for folder in atlas more; do test -d "$(DATA)/$$folder" || \
		{ echo "no folder $(DATA)/$$folder of dumps; say where they are: make quality DATA=path/to/data" >&2; exit 1; }; done
	@$(MAKE) --no-print-directory install
	for kept in target hops; do $(VENV)/bin/python -m ping_llm prepare "$(DATA)/atlas" "$(DATA)/more" --traceroute $$kept \
		--out data/quality$$(test $$kept = hops && echo -hops) --time-cut 2020-02-16 2020-02-19 || exit 1; done
	$(VENV)/bin/python -m ping_llm train configs/quality.toml
	$(VENV)/bin/python -m ping_llm eval --baselines-only --data data/quality --out runs/quality/baselines --seq-len 384
	$(VENV)/bin/python -m ping_llm eval runs/quality --data data/quality --scores runs/quality/baselines --seq-len 384 \
		--counts 0 10 --model-queries $(QUERIES) --src-known auto --precision bf16

# The model that comes with the package, made anew. Its card is, too: its name, how to ask it and its limits were written by
# hand, so carry them over by git diff.
model: quality
	rm -rf out/pretrained
	$(VENV)/bin/python -m ping_llm export runs/quality --to out/pretrained --dtype bf16 --rows data/quality \
		--results runs/quality/eval --license mit
	rm -rf src/ping_llm/pretrained && mv out/pretrained src/ping_llm/pretrained

test: install
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

# A SLURM of two virtual nodes, where Debian's packages can be installed; elsewhere the tests say why they skip.
test-slurm: install
	@(command -v slurmctld && command -v munged) >/dev/null || { apt-get update -q && apt-get install -yq slurm-wlm munge; } || true
	$(VENV)/bin/python -m pytest -rs tests/launch/test_slurm.py

# How many small changes of the modules that everything rests on the tests notice; hours, or MUTANTS='--share 0.1', or
# MUTANTS=model/loss.py.
mutants: install
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/mutants.py $(MUTANTS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The documentation as a folder of pages, site/, that reads without a network; a link or a name that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# What is uploaded to a package index, in dist/: the sdist, and the wheel that is built from it.
release: install
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) out site dist
