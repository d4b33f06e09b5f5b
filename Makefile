# Thin on purpose: the logic lives in the crates and in hardware-tests/setup.
# Everything is built into ./target; the lab keeps its own things under ./target/lab.

# Debian keeps tc, depmod and veritysetup where an ordinary user has no PATH.
export PATH := $(PATH):/usr/sbin:/sbin

MUSL  := x86_64-unknown-linux-musl
LAB   := target/debug/kiln-lab
TOUGH := target/tough/debug/kiln-tough
CARGO ?= cargo

.PHONY: help setup build agent tests lab test test-slow conformance oracle-tough tough bench fuzz lint
.DEFAULT_GOAL := help

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## Install what the lab and the tests need (Debian packages, Rust target), saying what and why
	@bash hardware-tests/setup

build: agent ## The programs: kiln, kiln-lab, and the agent as a small static binary
	@$(CARGO) build --locked -p kiln-server -p kiln-lab

# The linker is the compiler's own: it makes one of functions that are alike, some 50 kB.
LLD = $(abspath $(shell rustc --print target-libdir)/../bin/gcc-ld)
agent:
	@$(CARGO) rustc --locked -p kiln-agent --bin kiln-agent --profile agent --target $(MUSL) -- -Clink-arg=-B$(LLD) -Clink-arg=-fuse-ld=lld -Clink-arg=-Wl,--icf=all

lab: setup build ## A rack of virtual machines boots, comes up healthy and reimages itself; stays until Ctrl-C (LAB_ONCE=1: exits)
	@exec $(LAB) run $(LAB_ARGS)

# One selection of packages in every line of the tests: another one means other features, and half of everything anew.
# Set-up installs whatever of Debian's is asked for a second opinion: under KILN_ORACLES a test that misses it fails. What PyPI
# and npm have is fetched by the tests that ask it; where these are out of reach they say so, and fail under KILN_REGISTRIES.
# What was cut short is told at the end, because libtest shows nothing of tests that pass.
SKIPS := $(CURDIR)/target/skips
TEST := KILN_ORACLES=1 KILN_SKIPS=$(SKIPS) $(CARGO) test --locked --workspace
TELL_SKIPS := if [ -s $(SKIPS) ]; then echo 'Tests that were cut short, and why:'; sort $(SKIPS) | uniq -c; fi

tests:
	@$(TEST) --no-run

test: setup ## Every test of the fast tier: pure, processes in network namespaces, and a few QEMU boots
	@rm -f $(SKIPS)
	@$(CARGO) fmt --all --check
	@$(MAKE) --no-print-directory -j2 agent tests
	@$(TEST)
	@$(LAB) prepare --image probe
	@$(TEST) --test rack -- --test-threads 32
	@$(TELL_SKIPS)

SLOW_IMAGES := probe servers hangs hangs-servers disk vault thief rescue exec drifts acceptance acceptance-lab

test-slow: setup ## Every test of the rack, also those that take minutes, thousands of random repositories, what registries have, and cargo-deny's rules
	@rm -f $(SKIPS)
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	@$(CARGO) deny check bans licenses sources
	@$(MAKE) --no-print-directory -j2 agent tests
	@$(MAKE) --no-print-directory tough
	@$(LAB) prepare $(SLOW_IMAGES:%=--image %)
	@$(TEST) --test rack -- --test-threads 32 --include-ignored
	@KILN_REGISTRIES=1 KILN_TOUGH=$(CURDIR)/$(TOUGH) $(TEST) --test images -- --include-ignored
	@KILN_REGISTRIES=1 $(TEST) --test server -- oidc::
	@$(TELL_SKIPS)

conformance: setup ## The TUF community's conformance suite against the client (TUF_CONFORMANCE=a checkout of the suite)
	@$(CARGO) build --locked -p kiln-server -p kiln-lab
	@bash hardware-tests/conformance

# A crate of its own: it brings a second cryptography library, which no program of Kiln's may link.
tough:
	@$(CARGO) build --locked --quiet --manifest-path images/tests/tough/Cargo.toml --target-dir target/tough

oracle-tough: setup tough ## AWS' implementation of TUF: each reads what the other writes, and thousands of random repositories
	@KILN_TOUGH=$(CURDIR)/$(TOUGH) $(TEST) --test images -- --include-ignored tough

# The allow-list's costs are measured on this host, as root; the rest in the rack. BENCH_ARGS: see kiln-lab bench --help.
bench: setup agent tests ## The figures of docs/benchmarks.md that a rack can give: target/lab/report.json
	@KILN_AGENT=$(CURDIR)/target/$(MUSL)/agent/kiln-agent KILN_FIGURES=$(CURDIR)/target/lab/bench/exec.json \
	 $(TEST) --test exec_cost -- --ignored --exact what_it_costs --nocapture
	@KILN_FIGURES=$(CURDIR)/target/lab/bench/service.json \
	 $(TEST) --bin kiln-agent -- --ignored --exact service::tests::rest::what_the_service_costs_at_rest --nocapture
	@$(LAB) bench $(BENCH_ARGS)

fuzz: ## Every reader of foreign bytes under libFuzzer, FUZZ_SECONDS (60) for each of its targets
	@bash hardware-tests/fuzz

lint: setup ## Formatting, clippy, purity of the pure crates, banned crates
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@$(CARGO) test --locked -p kiln-lab --test purity
