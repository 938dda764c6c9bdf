# One environment in .venv, two commands: `make demo` and `make test`. Everything they need they install themselves.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo results test models peft bench bench-scale bench-call bench-privacy reliability tenant-install check security format protos base clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## Build the environment in .venv

# PyTorch comes first and pinned: a bare `torch` would bring gigabytes of CUDA to a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## Run the main job: tenants fine-tune privately against one hosted base
	$(BIN)/symbiosis simulate $(if $(OUT),--out $(OUT))

results: setup ## Run the main job again and renew the README's figures
	rm -rf runs/results
	$(BIN)/symbiosis simulate --out runs/results
	cp runs/results/result.json docs/results/simulate.json
	cp runs/results/losses.png docs/results/losses.png
	$(BIN)/python scripts/readme_tables.py

# Files go to as many processes as there are cores, so each has one thread for its products; tests/conftest.py says in
# which order.
test: setup ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

models: setup ## Walk the registry of transformers: every type split against local, and renew the README's table
	$(BIN)/python tests/models/walk.py
	$(BIN)/python scripts/readme_tables.py

peft: setup ## Try every PEFT method, split against local, and renew the README's table
	$(BIN)/python scripts/try_peft_methods.py
	$(BIN)/python scripts/readme_tables.py

bench: setup ## Measure N tenants against N separate PEFT jobs (25 minutes), and renew the README's table
	$(BIN)/symbiosis bench tenants --out benchmarks/results
	$(BIN)/python scripts/readme_tables.py

bench-scale: setup ## Memory and speed from 1 to 32 tenants
	$(BIN)/symbiosis bench scale --out benchmarks/results

bench-call: setup ## What one call costs, by rows and transport
	$(BIN)/symbiosis bench call --out benchmarks/results

bench-privacy: setup ## What each privacy mode costs and changes
	$(BIN)/symbiosis bench privacy --out benchmarks/results

# The short form is a test (tests/test_reliability.py). atheris is used where it installs.
reliability: setup ## Faults, kills, load, fuzzing and a soak of 30 minutes (an hour), and renew docs/reliability.md
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,fuzz]'
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m reliability
	$(BIN)/python scripts/reliability_card.py

tenant-install: setup ## Install the package alone, as a tenant does, and use it against a host
	$(BIN)/python -m pytest -m slow tests/test_tenant_install.py

check: setup ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# pip-audit asks PyPI's advisory service; what it cannot judge it names, and that is no failure.
security: $(VENV)/.security ## Bandit, known vulnerabilities of everything installed, and a bill of materials (build/sbom.json)
	$(BIN)/bandit -q -ll -c pyproject.toml -r symbiosis
	$(BIN)/pip-audit --progress-spinner off --timeout 5 --disable-pip --no-deps -r constraints.txt
	mkdir -p build
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json

$(VENV)/.security: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[security]'
	touch $@

format: setup ## Format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup ## Regenerate the protobuf code
	cd symbiosis/protocols && ../../$(BIN)/python -m grpc_tools.protoc -I. --python_out=_generated --pyi_out=_generated symbiosis_wire.proto

base: setup ## Train the built-in base again (about half an hour)
	$(BIN)/python scripts/train_base.py --compile

clean: ## Remove the environment and what tests leave
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
