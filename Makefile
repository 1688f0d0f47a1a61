# make run    make the environment, a tiny base model, and run the whole compiled pipeline on this machine
# make test   make the environment, check the code and run every test that needs no cluster
# make test-cluster   the chart, the images and a run on the cluster of KUBECONFIG
# make test-rig RIG=  the same on a cluster made for it on this machine, by the commands in that folder
# make workbench   build the page that the endpoint shows browsers (`make run` and `make test` do it too)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A run is a dozen short processes: without bytecode each would compile thousands of modules again.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
# A file of tests to each core, up to four: a process of them takes 2 GB.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: run test test-fast test-cluster test-rig lint format env workbench lock compile reference docs clean

run: env
	@$(MAKE) -s workbench || echo "the workbench page is not built (is an npm registry reached?); all else goes on without it"
	@$(BIN)/feyntune run

test: env lint workbench
	$(PYTEST) $(PARALLEL) -m "not cluster and not gpu"

test-fast: env lint workbench
	$(PYTEST) $(PARALLEL) -m "not cluster and not gpu and not slow"

test-cluster: env
	@test -n "$$KUBECONFIG" || { echo "KUBECONFIG is not set: name the cluster to test on"; exit 1; }
	$(PYTEST) -m cluster tests/cluster

test-rig: env
	@test -n "$(RIG)" || { echo "RIG is not set: name the folder with the commands tools, images, cluster and s3"; exit 1; }
	tests/cluster/rig.sh "$(RIG)"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile: env
	$(BIN)/python -m pipelines.compile

reference: env
	$(BIN)/python docs/reference.py
	$(BIN)/python charts/readme.py

docs: env
	$(BIN)/mkdocs build --strict

env: .venv/.ready

# torch comes first and alone, by pip: what else is installed then keeps the build that is there. Where pip would
# fetch the CUDA build and a CPU build is wanted: `UV_TORCH_BACKEND=cpu make env`.
.venv/.ready: requirements/dev.txt requirements/torch.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: apt-get install python3.11 python3.11-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "python venv failed: apt-get install python3-venv"; exit 1; }
	@echo "installing the environment into .venv (2 GB, a minute or two)"
	@$(BIN)/pip install -q --disable-pip-version-check uv
	@if [ -n "$$UV_TORCH_BACKEND" ]; then $(BIN)/uv pip install -q -r requirements/torch.txt; \
	 else $(BIN)/pip install -q --disable-pip-version-check -r requirements/torch.txt; fi
	@$(BIN)/uv pip install -q --no-deps --require-hashes -r requirements/dev.txt
	@$(BIN)/uv pip install -q --no-deps -e .
	@touch $@

# The endpoint's page, feyntune/serving/page, by the node and npm that the environment holds.
WORKBENCH := feyntune/serving/workbench
workbench: env feyntune/serving/page/index.html

feyntune/serving/page/index.html: $(wildcard $(WORKBENCH)/*.json $(WORKBENCH)/*.ts $(WORKBENCH)/*.html $(WORKBENCH)/src/*)
	@echo "building the workbench page"
	@cd $(WORKBENCH) && export PATH="$(CURDIR)/$(BIN):$$PATH" && npm ci --silent --ignore-scripts && npm run --silent build -- --logLevel warn

# Hashes, but no download addresses: anybody's package index serves.
lock:
	requirements/lock.sh $(CURDIR)/$(BIN)/uv

clean:
	rm -rf .venv runs feyntune/serving/page $(WORKBENCH)/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
