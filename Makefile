# The one entry to building, testing and demonstrating forkvm. `make help` lists the targets; docs/testing.md explains the tests.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: help build demo demo-linux linux test test-ways test-long test-svm bench examples lint setup

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))

help: ## Show this list
	@echo "forkvm: fork() for virtual machines. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s  %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  One test:                 cargo nextest run NAME        (cargo test NAME without nextest)"
	@echo "  One test on emulated SVM: make test-svm FILTER=NAME [CELL=6.1-npt0]"
	@echo "  Each test on one of them: make test-svm TURNS=1"
	@echo "  Does this host suffice?   $(TARGET)/release/forkvm doctor"
	@echo "demo, linux, test, test-svm and lint install the Debian packages they lack: run them as root or with sudo at hand."

build: ## Build the release binary target/release/forkvm
	@scripts/check-rust
	cargo build --release --bin forkvm

demo: ## Install what is missing, build, and map reads in 32 clones: target/demo.json, target/demo.sam
	@scripts/setup build demo
	@$(MAKE) --no-print-directory build
	"$(TARGET)/release/forkvm" demo --clones 32
	samtools quickcheck target/demo.sam
	@echo "samtools reads $$(samtools view -c target/demo.sam) records of target/demo.sam"

demo-linux: ## Install what is missing, boot a Linux machine once, and align sequences in 4 clones: target/demo-linux.json
	@scripts/setup build linux demo-linux
	@$(MAKE) --no-print-directory build
	"$(TARGET)/release/forkvm" demo-linux --clones 4

linux: ## Install what is missing, and build the Linux image `minimal`, or find it in the cache
	@scripts/setup build linux
	@$(MAKE) --no-print-directory build
	"$(TARGET)/release/forkvm" image build minimal --json "$(TARGET)/linux.json"

# Tests that do not care how clones live: in the test's own process, in workers, or from a pool of shells. Always with --workspace:
# a package alone has dependencies with other features, and all of it would be built again.
OF_EVERY_WAY := package(forkvm) & binary(/^(forks|faults|lazy|rewind|saved_machines)$$/)
EVERY_WAY := --workspace --no-fail-fast -E '$(OF_EVERY_WAY)'
# The search for torn images takes as long as the other 230 of them, and what it searches is the same in each way.
BRIEFLY := --workspace --no-fail-fast -E '$(OF_EVERY_WAY) - test(/^torn::/)'
EVERY_WAY_WITHOUT_NEXTEST := --workspace --no-fail-fast $(foreach binary,forks faults lazy rewind saved_machines,--test $(binary))

test: linux ## Install what is missing, and pass all tests of all crates, those that need KVM included
	@scripts/setup build test
	@scripts/check-rust
	@if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --workspace --no-fail-fast; \
	  FORKVM_TEST_SPAWNER=process cargo nextest run $(BRIEFLY) --partition hash:1/2; \
	  FORKVM_TEST_POOL=2 cargo nextest run $(BRIEFLY) --partition hash:2/2; \
	  cargo test --workspace --doc; \
	else \
	  cargo test --workspace --no-fail-fast; \
	fi

test-ways: ## The tests that do not care how clones live, all of them in workers and all with a pool of shells
	@scripts/setup build test
	@scripts/check-rust
	@if cargo nextest --version >/dev/null 2>&1; then \
	  FORKVM_TEST_SPAWNER=process cargo nextest run $(EVERY_WAY); \
	  FORKVM_TEST_POOL=2 cargo nextest run $(EVERY_WAY); \
	else \
	  FORKVM_TEST_SPAWNER=process cargo test $(EVERY_WAY_WITHOUT_NEXTEST); \
	  FORKVM_TEST_POOL=2 cargo test $(EVERY_WAY_WITHOUT_NEXTEST); \
	fi

test-long: linux ## Only the tests that `make test` leaves out because they take long (#[ignore])
	@scripts/setup build test
	@scripts/check-rust
	@if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --workspace --no-fail-fast --profile long --run-ignored only --no-tests pass; \
	else \
	  cargo test --workspace --no-fail-fast -- --ignored; \
	fi

test-svm: linux ## The KVM tests and small demos on emulated AMD hardware, Linux 6.12 and 6.1, npt on and off
	@scripts/setup build svm
	@scripts/check-rust
	lanes/svm/run $(addprefix --cell ,$(CELL)) $(if $(TURNS),--turns) -- '$(FILTER)'

bench: build ## Measure everything, in less than 10 minutes: target/bench/index.html
	@mkdir -p "$(TARGET)/bench"
	"$(TARGET)/release/forkvm" bench all --json "$(TARGET)/bench/results.json" --csv "$(TARGET)/bench/results.csv" \
	  --svg "$(TARGET)/bench/plots" --html "$(TARGET)/bench/index.html"

examples: ## Run every program in examples/
	@scripts/check-rust
	cargo build --quiet --workspace --examples
	for example in examples/*.rs; do "$(TARGET)/debug/examples/$$(basename "$$example" .rs)"; done

lint: ## Formatting, clippy and rustdoc with warnings as errors, shellcheck
	@scripts/setup build lint
	@scripts/check-rust fmt clippy
	cargo metadata --locked --format-version=1 >/dev/null
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --workspace --lib --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	cd guest-images/bare && cargo fmt --check
	cd guest-images/bare && cargo clippy --release --locked --target-dir "$(TARGET)/bare" -- -D warnings
	shellcheck .ci/run scripts/setup scripts/check-rust lanes/svm/init

setup: ## Install all Debian packages that any target needs
	@scripts/setup all
	@scripts/check-rust fmt clippy
