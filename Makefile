# One entry point for everything: `make` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
TIMED := deploy/timed.sh
EMULATED_NODE := $(TIMED) "end-to-end tests on kvm, in an emulated node" env CARGO=$(CARGO) e2e/node/test.sh
JAIL_ON_KVM := $(TIMED) "takeovers on kvm, in an emulated node" env CARGO=$(CARGO) e2e/node/jail.sh takeover table

# Tests that run at once. A pod is a virtual machine; two keep two cores busy.
TEST_THREADS ?= 2

# Tests of the VMM and of the agent boot this kernel.
export DRUPE_TEST_KERNEL := $(CURDIR)/out/guest/kernel-uml
export DRUPE_TEST_INITRAMFS := $(CURDIR)/out/guest/initramfs
export DRUPE_TEST_VMM := $(CURDIR)/out/bin/drupe-vmm
# Tests of the image service unpack layers with this program.
export DRUPE_TEST_UNPACKER := $(CURDIR)/out/bin/drupe-unpacker

.PHONY: help setup build install uninstall deb image demo test e2e critest test-kvm jail test-cluster test-install test-fresh fuzz bench bench-cluster bench-kvm lint clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install the Debian packages, build the guest kernel and the test tools (kept in a cache)
	@deploy/install-packages.sh $(SETUP_EXTRA)
	@$(TIMED) "guest kernel for uml" deploy/guest-kernel/build.sh uml out/guest
	@$(TIMED) "guest kernel for kvm" deploy/guest-kernel/build.sh kvm out/guest
	@e2e/tools/build.sh out/tools
	@e2e/fetch-packages.sh out/debs

build: ## Build the daemon, the VMM, the agent and the guest's initramfs into out/
	@$(TIMED) "drupe and its programs" $(CARGO) build --release --workspace
	@install -D -t out/bin $(addprefix $(TARGET_DIR)/release/,drupe drupe-vmm drupe-shim drupe-unpacker)
	@$(TIMED) "agent and initramfs" deploy/initramfs/build.sh out/guest/initramfs

# Not after `build`: it is run by root, who is often not the one who builds.
install: ## Install what was built, with a systemd unit; DESTDIR= and PREFIX=/usr say where (docs/install.md)
	@DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) deploy/install.sh install

uninstall: ## Remove what `make install` installed; configuration, images and records stay
	@DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) deploy/install.sh uninstall

deb: setup build ## Make the Debian package, out/drupe.deb
	@deploy/debian/cargo-deb.sh out/tools
	@deploy/documents.sh out/bin/drupe out/documents
	@out/bin/drupe config > out/documents/config.yaml
	@$(TIMED) "Debian package" out/tools/cargo-deb --quiet --no-build --package cri-server --output out/drupe.deb

image: setup build ## Make the OCI image for deploy/kubernetes, out/drupe-image.tar
	@$(TIMED) "OCI image" deploy/image/build.sh out/drupe-image.tar

demo: setup build ## Run one pod on its own kernel and show it; IMAGE=... takes any image this machine reaches
	@$(TARGET_DIR)/release/demo $(IMAGE)

# Always the whole workspace: another selection of packages would mean another
# selection of features, and the dependencies compiled anew.
test: setup build out/node ## Unit tests, the end-to-end tests, CRI's conformance tests, and tests on kvm in an emulated node
	@$(TIMED) "all tests" $(CARGO) test --release --workspace -- --test-threads=$(TEST_THREADS)
	@$(TIMED) "conformance tests of CRI" env PARALLEL=$(TEST_THREADS) $(TARGET_DIR)/release/critest
	@$(JAIL_ON_KVM)
	@$(EMULATED_NODE)

e2e: setup build ## Only the end-to-end tests
	@$(TIMED) "end-to-end tests" $(CARGO) test --release --workspace --test e2e -- --test-threads=$(TEST_THREADS)

# PARALLEL, FOCUS, SKIP and HANDLER reach the program by its environment.
critest: ## Kubernetes' conformance tests of CRI; PARALLEL=2 at once, FOCUS='...' and SKIP='...' choose by name
critest: setup build
	@$(TARGET_DIR)/release/critest record

test-cluster: setup build out/kubernetes ## What users of a cluster do, on a real control plane and kubelet; TEST='...' chooses by name
	@$(TIMED) "tests in a cluster" $(CARGO) test --release --workspace --test cluster -- $(TEST)

.PHONY: out/kubernetes
out/kubernetes:
	@$(TIMED) "Kubernetes' programs" e2e/tools/kubernetes/build.sh $@
	@$(TIMED) "CoreDNS" e2e/tools/coredns/build.sh $@

test-install: deb image out/kubernetes ## The package and the DaemonSet on a Debian node with systemd; TEST=package or daemonset takes one
	@e2e/install/build.sh out/install
	@$(TIMED) "tests of installing" e2e/install/test.sh $(TEST)

# Long, and not a part of `test`: that is what runs in there.
test-fresh: ## `make setup demo test` on a minimal Debian with Rust and Go alone; FRESH_CACHE=1 shares the cache of guest kernels, PART=setup takes one
	@deploy/install-packages.sh
	@$(TIMED) "a fresh machine" e2e/fresh/test.sh $(PART)

jail: setup build out/node ## Take over each process of a pod in turn, try what an attacker would, and print what is open (docs/security.md)
	@$(TIMED) "takeovers on uml" $(CARGO) test --release --workspace --test boot -- --nocapture takeover confinement table
	@$(TIMED) "takeovers of what unpacks layers" $(CARGO) test --release --workspace --test jail
	@$(JAIL_ON_KVM)

test-kvm: setup build out/node ## End-to-end tests on kvm, in an emulated bare-metal node
	@$(EMULATED_NODE)

.PHONY: out/node
out/node:
	@e2e/node/build.sh $@

fuzz: ## Fuzz with hostile guests, clients and images, FUZZ_SECONDS (60) a target; FUZZ=blk takes one
	@e2e/fuzz.sh $(or $(FUZZ_SECONDS),60) $(FUZZ)

bench: ## Measure pods; PEER=containerd measures Debian's containerd and runc beside it
bench: SETUP_EXTRA = $(if $(PEER),$(PEER) runc)
bench: setup build
	@$(TARGET_DIR)/release/bench $(PEER)

bench-cluster: setup build out/kubernetes ## Measure pods from kubectl create to Ready, beside containerd and runc under the same kubelet; more than 1.5 times theirs is an error
bench-cluster: SETUP_EXTRA = containerd runc
bench-cluster:
	@$(TARGET_DIR)/release/bench-cluster

bench-kvm: setup build out/node ## Measure the kvm machine beside QEMU's microvm, in an emulated node; BENCH=boot|disk|net takes a part
	@CARGO=$(CARGO) e2e/node/bench.sh $(BENCH)

lint: ## Check format, lints, scripts, links between pages (and licences, where cargo-deny is installed)
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets -- -D warnings
	@git ls-files -co --exclude-standard '*.sh' .ci/run | xargs shellcheck
	@deploy/check-links.sh README.md docs/*.md
	@if command -v cargo-deny > /dev/null; then $(CARGO) deny check; fi

clean: ## Remove what was built here; the cache of kernels and tools stays
	@$(CARGO) clean
	@rm -rf out
