# Cargo and Docker know what is up to date, so almost nothing here is a file. `make help` lists what there is.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory

IMAGE               ?= inference-proxy:latest
TEST_IMAGE          ?= inference-proxy:test
DOCKER_TEST_THREADS ?= 6
export FUZZ_SECONDS ?= 60
export DEMO_PORT    ?= 8080

# The binary for images: static, for this machine's architecture. Its own target directory, because other RUSTFLAGS
# would make every plain `cargo build` after it start over.
HOST        = $(shell rustc -vV | sed -n 's/^host: //p')
VERSION     = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
STATIC_DIR := target/static
BINARY     := dist/inference-proxy

.DEFAULT_GOAL := help
.PHONY: help demo demo-down test test-fast test-prometheus test-sdk test-page test-docker fuzz check fmt image image-test binary clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-16s %s\n", $$1, $$2 }'

demo: ## Start the proxy and two demo backends in containers, and try them (DEMO_PORT=8080)
	@.ci/prepare rust curl docker compose
	@$(MAKE) image IMAGE=inference-proxy:latest
	@.ci/demo up

demo-down: ## End the demo
	@.ci/demo down

test: test-fast test-prometheus test-sdk test-page test-docker ## Run every test; sets up Docker when it is missing

test-fast: ## Run the unit and integration tests; needs no Docker
	@.ci/prepare rust
	@if cargo nextest --version >/dev/null 2>&1; then \
	    set -x; cargo nextest run --locked; cargo test --locked --doc; \
	else \
	    set -x; cargo test --locked; \
	fi

test-prometheus: ## Have Prometheus read the metrics and answer the dashboard's queries
	@.ci/prepare rust prometheus compose
	.ci/compose -f compose.example.yml --profile observability config --quiet
	PROMETHEUS_REQUIRED=1 cargo test --locked --test it -- observability::

# The binary as the integration tests build it: `cargo build` would take other features, and most of a build more.
test-sdk: ## Run the official Python SDKs against the proxy
	@.ci/prepare rust python
	cargo test --locked --no-run --test it
	.ci/sdk

test-page: ## Run the status page in a headless browser
	@.ci/prepare rust python3 chromium
	cargo test --locked --no-run --test it
	.ci/page

test-docker: image-test ## Run the tests against the real Docker Engine (DOCKER_TEST_THREADS=6)
	@.ci/prepare compose netns traefik
	DOCKER_REQUIRED=1 INFERENCE_PROXY_IMAGE=$(TEST_IMAGE) \
	    cargo test --locked --test docker -- --test-threads=$(DOCKER_TEST_THREADS) --show-output

fuzz: ## Fuzz what reads foreign bytes, each target for a while (FUZZ_SECONDS=60)
	@.ci/prepare rust
	@.ci/fuzz

# `--all-targets` leaves out a target that plain `cargo test` does not run, so the Docker suite is named.
check: ## Check formatting, lints, documentation, licences
	@.ci/prepare rust
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --test docker -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --lib --document-private-items
	@if cargo deny --version >/dev/null 2>&1; then set -x; cargo deny --locked check bans licenses sources; fi

fmt: ## Format the code
	cargo fmt

image: binary ## Build the image from a static binary built here (IMAGE=inference-proxy:latest)
	@.ci/prepare docker
	docker build --quiet --target local --build-arg VERSION=$(VERSION) -t $(IMAGE) .
	@docker image inspect -f '$(IMAGE) is {{.Size}} bytes' $(IMAGE)

image-test:
	@$(MAKE) image IMAGE=$(TEST_IMAGE)

binary: ## Build the static binary (dist/inference-proxy)
	@.ci/prepare rust
	RUSTFLAGS='-C target-feature=+crt-static' CARGO_TARGET_DIR=$(STATIC_DIR) \
	    cargo build --locked --release --bin inference-proxy --target $(HOST)
	@mkdir -p $(dir $(BINARY))
	@cmp -s $(STATIC_DIR)/$(HOST)/release/inference-proxy $(BINARY) || \
	    install $(STATIC_DIR)/$(HOST)/release/inference-proxy $(BINARY)

clean: ## Remove what was built here (images stay)
	cargo clean
	rm -rf dist
