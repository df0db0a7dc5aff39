# From a fresh clone to tables, figures and paper: `make reproduce`. `make` alone lists everything.

PYTHON ?= python3
CORES  ?= all
CONFIG ?=
VLLM   ?=
UV     ?= uv

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LOCK   := envs/requirements.lock

# Scripts started by Snakemake, and ninja, are looked up on PATH; the pinned ones must come first.
# Snakemake keeps a cache in the home folder; where that cannot be written, in the checkout.
HOMELESS := $(CURDIR)/.snakemake/home
CACHE   := $(shell test -w "$$HOME" || echo 'XDG_CACHE_HOME="$(HOMELESS)/cache" XDG_CONFIG_HOME="$(HOMELESS)/config"')
RUN     := $(CACHE) PATH="$(CURDIR)/$(BIN):$$PATH"
APT     := on Debian or Ubuntu: sudo apt install
SOURCES := $(wildcard Snakefile) workflow
# A worker takes whole files, in the order of tests/conftest.py: what a file's tests share is made once.
TESTERS := --numprocesses $(patsubst all,auto,$(CORES)) --dist loadfile --no-loadscope-reorder
# Hardware libraries of one PyTorch build; pip adds them itself where the build needs them.
HARDWARE := /^(cuda-|nvidia-(cu|nccl|nvjitlink|nvshmem|nvtx)|triton==)/d

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install reproduce report snakemake-report test kill-test slurm-test lint format bench lock rebuild-extensions install-vllm clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo ""
	@echo "  CORES=n        processor cores for the workflow (now: $(CORES)); part of a record's identity"
	@echo "  CONFIG=file    another configuration, for example config/recorded.yaml"
	@echo "  PYTHON=path    interpreter for $(VENV), 3.11 or newer (now: $(PYTHON))"

install: $(STAMP) ## put the pinned packages into .venv (the targets below do this by themselves)

reproduce: $(STAMP) ## run the whole workflow: inputs, cells, tables, claims, figures, section, PDF
	@$(if $(CONFIG),$(RUN) PYTHONPATH=workflow python -m kvbench.inputs.readable "$(CONFIG)")
	@$(RUN) snakemake --cores $(CORES) $(if $(CONFIG),--configfile "$(CONFIG)")

report: $(STAMP) ## write results/report.en.html and report.pt.html: everything on one page
	@$(RUN) snakemake report --cores $(CORES) $(if $(CONFIG),--configfile "$(CONFIG)")

snakemake-report: $(STAMP) ## write results/snakemake-report.html: Snakemake's own, with the graph of jobs
	@$(RUN) snakemake --cores $(CORES) $(if $(CONFIG),--configfile "$(CONFIG)") --report results/snakemake-report.html

lint: $(STAMP) ## check format and style of the workflow and of Python
	$(RUN) snakefmt --check $(SOURCES)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) snakemake --lint

test: lint ## lint, then every test, in as many workers as CORES says (all: one per processor, at most four)
	$(RUN) pytest $(TESTERS)

kill-test: $(STAMP) ## kill a run fifty times at random moments and go on each time (KVBENCH_KILL_SEED=n)
	$(RUN) KVBENCH_KILLS=50 pytest tests/workflow/test_kills.py

slurm-test: $(STAMP) ## run the workflow on a Slurm of one machine (as root; Debian's slurmctld slurmd slurm-client munge)
	$(RUN) KVBENCH_SLURM=1 pytest tests/workflow/test_slurm.py

bench: $(STAMP) ## print what the harness itself costs, and whether its bounds are met (tests/benchmarks)
	@failed=; for script in tests/benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "make: tests/benchmarks holds no script"; exit 1; }; \
	  echo "== $$script"; $(RUN) PYTHONPATH=workflow python "$$script" || failed="$$failed $$script"; done; \
	[ -z "$$failed" ] || { echo "make: these benches failed:$$failed"; exit 1; }

format: $(STAMP) ## rewrite the sources in the checked format
	$(RUN) snakefmt $(SOURCES)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

lock: ## write envs/requirements.lock anew from envs/requirements.in (needs uv)
	@command -v $(UV) >/dev/null || { echo "make: '$(UV)' not found; it resolves the lock: pip install uv"; exit 1; }
	@cp $(LOCK) $(LOCK).part  # keep what need not change
	$(UV) pip compile --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate \
	  --quiet envs/requirements.in --output-file $(LOCK).part
	@{ echo "# Every package at its exact version, for Python 3.11 and newer. Written by 'make lock' from requirements.in."; \
	  sed -E '$(HARDWARE)' $(LOCK).part; } > $(LOCK).new && mv $(LOCK).new $(LOCK) && rm $(LOCK).part

rebuild-extensions: $(STAMP) ## compile the quantisation kernels again (after installing a compiler)
	@$(RUN) python envs/build_extensions.py

install-vllm: ## put the engine vLLM into .venv-vllm (3.5 GB; VLLM=vllm==0.33.0 on a machine with CUDA)
	@echo "Installing vLLM into .venv-vllm (some minutes)"
	@"$(PYTHON)" -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(VLLM),"$(VLLM)",--no-deps --requirement envs/vllm.lock)
	@.venv-vllm/bin/python -c 'import vllm; print("vLLM", vllm.__version__, "is ready")'

clean: ## delete what is derived from records; measured cells and results/recorded stay
	rm -rf results/tables results/claims results/figures results/paper results/report.*.html \
	  results/snakemake-report.html results/manifest.json .snakemake/drawn

$(STAMP): $(LOCK) envs/build_extensions.py
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: '$(PYTHON)' not found; install Python 3.11 or newer ($(APT) python3 python3-venv)"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$("$(PYTHON)" --version) is too old; Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' cannot make virtual environments ($(APT) python3-venv)"; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (some minutes the first time)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $(LOCK)
	@$(RUN) python envs/build_extensions.py
	@touch $@
