# All targets, for people and for CI. `make` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

ENVIRONMENT := .venv
BIN := $(ENVIRONMENT)/bin
export PATH := $(PATH):/usr/sbin:/usr/lib/rabbitmq/bin

COMPILED_TESTS := tests/unit/test_compiled.py tests/unit/test_request_parser.py tests/unit/test_conditionals.py tests/unit/test_ranges.py \
	tests/unit/test_asset_decision.py tests/integration/test_object_cache.py tests/integration/test_fast_path.py \
	tests/integration/test_fast_path_equivalence.py tests/integration/test_changed_files.py tests/integration/test_fuzz.py
SOURCES := services shared tests deploy $(wildcard benchmarks)
PYTEST := $(BIN)/python -m pytest
# Two processes more than CPUs, since most tests wait for something.
SIDE_BY_SIDE ?= --numprocesses $(shell echo $$(($$(nproc) + 2))) --dist worksteal
# $(call tests,which,options of the first run): a test that failed beside others, or on a busy machine, must pass by
# itself. Exit code 5: ARGS names no test of this part.
define tests
@code=0; $(PYTEST) $(2) $(1) || code=$$?; \
case $$code in 0|5) ;; 1) echo "--- failed tests once more, by themselves ---"; $(PYTEST) --last-failed --last-failed-no-failures none $(1) ;; *) exit $$code ;; esac
endef
# The files with tests that run by themselves: the others need not be imported for them.
ALONE = $(shell grep --recursive --files-with-matches --include='test_*.py' 'mark\.alone' tests)
# Modules that print an OpenAPI document, each with its document beside it.
OPENAPI := services/api/openapi services/api/operator/openapi
ARGS ?=
COMPOSE ?= docker compose
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-emit-index-url --no-emit-find-links

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## environment

$(ENVIRONMENT)/.runtime: requirements/runtime.txt pyproject.toml
	@deploy/environment/install.sh $(ENVIRONMENT) requirements/runtime.txt
	@touch $@

$(ENVIRONMENT)/.development: requirements/development.txt requirements/runtime.txt pyproject.toml
	@deploy/environment/install.sh $(ENVIRONMENT) requirements/development.txt
	@touch $(ENVIRONMENT)/.runtime $@

.PHONY: setup
setup: $(ENVIRONMENT)/.development ## install everything into .venv (nothing to do when it is up to date)

.PHONY: servers
servers: ## find redis-server and rabbitmq-server, or install them (for the tests)
	@deploy/servers/find-or-install.sh

.PHONY: lock
lock: setup ## update the pins in requirements/, and their hashes, from pyproject.toml
	@$(LOCK) --upgrade pyproject.toml --output-file requirements/runtime.txt
	@$(LOCK) --upgrade --extra tracing --constraints requirements/runtime.txt pyproject.toml --output-file requirements/tracing.txt
	@$(LOCK) --upgrade --extra development --constraints requirements/tracing.txt pyproject.toml --output-file requirements/development.txt
	@$(LOCK) --upgrade --constraints requirements/development.txt requirements/compile.in --output-file requirements/compile.txt
	@for pins in runtime tracing development compile; do $(LOCK) --no-deps --no-annotate --generate-hashes requirements/$$pins.txt --output-file requirements/$$pins.hashed.txt; done

## running

.PHONY: run
run: $(ENVIRONMENT)/.runtime ## a node on this machine with demo objects; Ctrl-C stops it
	@$(BIN)/python deploy/environment/foreground.py $(BIN)/python -m distributor_node.services.demo_run $(ARGS)

.env: .env.example
	@deploy/environment/make-passwords.sh .env.example .env

.PHONY: up
up: .env ## the whole stack with docker compose (ARGS="--profile demo" and the like go before `up`)
	@$(COMPOSE) $(ARGS) up --detach --build --wait

.PHONY: down
down: .env ## stop the stack; volumes and their objects stay
	@$(COMPOSE) --profile '*' down

FLEET := $(COMPOSE) --project-directory . --file deploy/compose/fleet.yml

.PHONY: up-fleet
up-fleet: .env ## three nodes that act as one cache, behind the edge, with docker compose
	@$(FLEET) $(ARGS) up --detach --build --wait

.PHONY: down-fleet
down-fleet: .env ## stop them; volumes and their objects stay
	@$(FLEET) --profile '*' down

.PHONY: logs
logs: .env ## follow the stack's logs
	@$(COMPOSE) --profile '*' logs --follow --tail 100

## checking

.PHONY: check
check: setup ## format, lint, types, layers, generated documents
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy distributor_node tests deploy $(wildcard benchmarks)
	@$(BIN)/lint-imports
	@$(BIN)/distributor config reference | diff -u docs/configuration.md - || { echo "docs/configuration.md is out of date: make reference" >&2; exit 1; }
	@$(BIN)/distributor config schema | diff -u docs/settings.schema.json - || { echo "docs/settings.schema.json is out of date: make reference" >&2; exit 1; }
	@for document in $(OPENAPI); do $(BIN)/python -m distributor_node.$${document//\//.} | diff -u $$document.json - || { echo "$$document.json is out of date: make reference" >&2; exit 1; }; done

.PHONY: format
format: setup ## format the code, and repair what ruff can
	@$(BIN)/ruff check --fix-only $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

.PHONY: reference
reference: setup ## write docs/configuration.md, docs/settings.schema.json, both OpenAPI documents and the Kubernetes alert rules from their sources
	@$(BIN)/distributor config reference > docs/configuration.md.new
	@mv docs/configuration.md.new docs/configuration.md
	@$(BIN)/distributor config schema > docs/settings.schema.json.new
	@mv docs/settings.schema.json.new docs/settings.schema.json
	@for document in $(OPENAPI); do $(BIN)/python -m distributor_node.$${document//\//.} > $$document.json.new; mv $$document.json.new $$document.json; done
	@$(BIN)/python deploy/prometheus/kubernetes_rule.py > deploy/kubernetes/monitoring/rules.yaml.new
	@mv deploy/kubernetes/monitoring/rules.yaml.new deploy/kubernetes/monitoring/rules.yaml

.PHONY: test
test: setup servers ## all tests but those of Docker, chaos and browsers, against real Redis and RabbitMQ
	$(call tests,-m "not docker and not chaos and not alone" --ignore tests/browser $(ARGS),$(SIDE_BY_SIDE))
	$(call tests,-m "alone and not docker and not chaos" $(or $(ARGS),$(ALONE)))

.PHONY: test-unit
test-unit: setup ## the quick tests: unit and contract
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not docker and not chaos" tests/unit tests/deploy tests/contract $(ARGS)

.PHONY: test-docker
test-docker: setup ## the stack in containers: build, up, scale, use, break, down
	$(call tests,-m docker --timeout 900 $(ARGS))

.PHONY: test-chaos
test-chaos: setup ## kill, cut, fill and corrupt, and check what clients see (CHAOS_SEED, CHAOS_KILLS, MODEL_SEED, MODEL_EXAMPLES)
	@deploy/servers/find-or-install.sh redis-server rabbitmq-server faketime
	@$(PYTEST) tests/chaos --timeout 900 $(ARGS)

.PHONY: test-browser
test-browser: setup ## a real browser against a node; installs Chromium where apt is allowed, hls.js and axe-core below build/
	@deploy/servers/find-or-install.sh chromium npm
	@npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix build/browser hls.js@1.7.4 axe-core@4.14.1
	@$(PYTEST) tests/browser $(ARGS)
COMPILED := build/compiled
.PHONY: compile
compile: setup ## compile the fast path with mypyc, in a copy of the sources: run it with PYTHONPATH=build/compiled
	@rm -rf $(COMPILED) && mkdir -p $(COMPILED)
	@git ls-files -z pyproject.toml services shared distributor_node tests benchmarks deploy docs | xargs -0 cp --parents -P -t $(COMPILED)
	@cp -rL $(COMPILED)/distributor_node $(COMPILED)/package && rm -r $(COMPILED)/distributor_node && mv $(COMPILED)/package $(COMPILED)/distributor_node
	@$(BIN)/python deploy/release/compile_fast_path.py $(COMPILED)

# The compiled copy, not the code that is installed: its folder comes first.
.PHONY: test-compiled
test-compiled: compile ## the tests of the fast path, against its compiled modules
	@cd $(COMPILED) && PYTHONPATH=$(CURDIR)/$(COMPILED) $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(COMPILED_TESTS) $(ARGS)

.PHONY: fuzz
fuzz: setup ## mutated requests to both parsers and to nginx: all must find the same requests (ARGS="--mutations 5000 --seed 1")
	@$(BIN)/python -m tests.fuzz $(ARGS)

.PHONY: soak
soak: setup servers ## traffic with random kills and cuts, 10 minutes (ARGS="--minutes 60 --seed 7")
	@$(BIN)/python -m tests.chaos.soak $(ARGS)

.PHONY: bench
bench: setup servers ## measure hits, misses and fetches beside nginx
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: bench-compiled
bench-compiled: compile servers ## the same with the fast path compiled, as in the image
	@cd $(COMPILED) && PYTHONPATH=$(CURDIR)/$(COMPILED) $(abspath $(BIN))/python -m benchmarks --results $(CURDIR)/benchmarks/results $(ARGS)

.PHONY: bench-compare
bench-compare: setup servers ## measure this tree beside BASE (a commit, or a folder with the package), interleaved
	@$(BIN)/python -m benchmarks.compare $(BASE) $(ARGS)

.PHONY: bench-scale
bench-scale: setup servers ## measure what 10^4 to 10^6 objects cost
	@$(BIN)/python -m benchmarks.scale $(ARGS)

.PHONY: bench-fair
bench-fair: setup servers ## measure look-ups and downloads under load: fairness, batches, slow sources, killed fetchers
	@$(BIN)/python -m benchmarks.fair $(ARGS)

.PHONY: bench-policies
bench-policies: setup servers ## compare eviction policies and windows on generated traces, and measure 10^6 objects
	@$(BIN)/python -m benchmarks.policy_families
	@$(BIN)/python -m benchmarks.policies $(ARGS)
	@$(BIN)/python -m benchmarks.policy_windows
	@$(BIN)/python -m benchmarks.policy_scale

## releasing

.PHONY: release
release: setup ## wheel, sdist and notes of the version in pyproject.toml, in dist/ (docs/releasing.md)
	@$(BIN)/python deploy/release/release.py dist

.PHONY: release-image
release-image: ## the image for amd64 and arm64 by docker buildx, in dist/ (IMAGE_OUTPUT="--push" IMAGE=… to push it)
	@deploy/release/image.sh dist

.PHONY: sbom
sbom: setup ## a list of what the node is made of (CycloneDX), in dist/
	@deploy/release/sbom.sh $(BIN)/python dist

.PHONY: audit
audit: setup ## look the pins up in the list of known vulnerabilities (needs the network)
	@deploy/release/audit.sh $(BIN)/python requirements/runtime.txt

.PHONY: clean
clean: ## remove what was built here (.venv and caches; not the demo's cached objects)
	@rm -rf $(ENVIRONMENT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
