# One environment in .venv, two commands: `make demo` and `make test`. Everything they need they install themselves.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo results test models peft bench bench-scale bench-call bench-privacy tenant-install check format protos base clean

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

# Files go to as many processes as there are cores, so each has one thread for its products.
test: setup ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

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

tenant-install: setup ## Install the package alone, as a tenant does, and use it against a host
	$(BIN)/python -m pytest -m slow tests/test_tenant_install.py

check: setup ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## Format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup ## Regenerate the protobuf code
	cd symbiosis/protocols && ../../$(BIN)/python -m grpc_tools.protoc -I. --python_out=_generated --pyi_out=_generated symbiosis_wire.proto

base: setup ## Train the built-in base again (about half an hour)
	$(BIN)/python scripts/train_base.py --compile

clean: ## Remove the environment and what tests leave
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
