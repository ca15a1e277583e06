# `make demo` and `make test` are all a newcomer needs; each installs first what is missing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Benchmarks without it are short as they are.
BENCH_FLAGS ?= --short
NATIVE_SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt

.PHONY: help install demo serve test test-native lint format bench graph clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

install: $(INSTALLED) ## Create .venv with everything a developer needs

$(INSTALLED): pyproject.toml tools/install.sh $(NATIVE_SOURCES)
	PYTHON='$(PYTHON)' TORCH='$(TORCH)' tools/install.sh $(VENV)
	@touch $@

demo: $(INSTALLED) ## Two engines, a tiered KV cache and a router serve one workload three ways (MODEL= for your own)
	$(BIN)/kvstrata demo $(if $(MODEL),--model $(MODEL)) $(DEMO_FLAGS)

serve: $(INSTALLED) ## Serve MODEL (directory or hub id) over the OpenAI API
	@test -n "$(MODEL)" || { echo "usage: make serve MODEL=<directory or hub id>" >&2; exit 2; }
	$(BIN)/kvstrata serve $(MODEL) $(SERVE_FLAGS)

test: $(INSTALLED) ## Run the Python tests
	$(BIN)/python -m pytest $(TEST_FLAGS)

test-native: $(INSTALLED) ## Build and run the native tests under ASan + UBSan, then under TSan
	tools/native_tests.sh $(BIN) address,undefined
	tools/native_tests.sh $(BIN) thread

lint: $(INSTALLED) ## Check style, types and the drawn import graph
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/import_graph.py --check

format: $(INSTALLED) ## Format the Python sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Run a short form of every benchmark; figures as JSON (BENCH_FLAGS= for the full forms; installs vLLM, builds llama.cpp)
	@for file in $(filter-out benchmarks/bench_environment.py,$(wildcard benchmarks/bench_*.py)); do \
		echo "# $$file" >&2; \
		$(BIN)/python $$file $$(grep -q -e '"--short"' $$file && echo '$(BENCH_FLAGS)') || exit 1; \
	done

graph: $(INSTALLED) ## Redraw the import graph in docs/architecture.md
	$(BIN)/python tools/import_graph.py

clean: ## Remove everything that was built or installed here
	rm -rf $(VENV) build
