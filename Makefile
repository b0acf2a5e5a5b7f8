# One entry point for everything: `make` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
TIMED := deploy/timed.sh

# Tests that run at once. A pod is a virtual machine; two keep two cores busy.
TEST_THREADS ?= 2

# Tests of the VMM and of the agent boot this kernel.
export DRUPE_TEST_KERNEL := $(CURDIR)/out/guest/kernel-uml
export DRUPE_TEST_INITRAMFS := $(CURDIR)/out/guest/initramfs
export DRUPE_TEST_VMM := $(CURDIR)/out/bin/drupe-vmm

.PHONY: help setup build demo test e2e bench lint clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install the Debian packages, build the guest kernel and the test tools (kept in a cache)
	@deploy/install-packages.sh $(SETUP_EXTRA)
	@$(TIMED) "guest kernel" deploy/guest-kernel/build.sh uml out/guest
	@e2e/tools/build.sh out/tools
	@e2e/fetch-packages.sh out/debs

build: ## Build the daemon, the VMM, the agent and the guest's initramfs into out/
	@$(TIMED) "drupe and drupe-vmm" $(CARGO) build --release --workspace
	@install -D -t out/bin $(TARGET_DIR)/release/drupe $(TARGET_DIR)/release/drupe-vmm
	@$(TIMED) "agent and initramfs" deploy/initramfs/build.sh out/guest/initramfs

demo: setup build ## Run one pod on its own kernel and show it; IMAGE=... takes any image this machine reaches
	@$(TARGET_DIR)/release/demo $(IMAGE)

# Always the whole workspace: another selection of packages would mean another
# selection of features, and the dependencies compiled anew.
test: setup build ## Unit tests, then the end-to-end tests
	@$(TIMED) "all tests" $(CARGO) test --release --workspace -- --test-threads=$(TEST_THREADS)

e2e: setup build ## Only the end-to-end tests
	@$(TIMED) "end-to-end tests" $(CARGO) test --release --workspace --test e2e -- --test-threads=$(TEST_THREADS)

bench: ## Measure pods; PEER=containerd measures Debian's containerd and runc beside it
bench: SETUP_EXTRA = $(if $(PEER),$(PEER) runc)
bench: setup build
	@$(TARGET_DIR)/release/bench $(PEER)

lint: ## Check format, lints, scripts (and licences, where cargo-deny is installed)
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets -- -D warnings
	@git ls-files -co --exclude-standard '*.sh' .ci/run | xargs shellcheck
	@if command -v cargo-deny > /dev/null; then $(CARGO) deny check; fi

clean: ## Remove what was built here; the cache of kernels and tools stays
	@$(CARGO) clean
	@rm -rf out
