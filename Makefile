# The targets of mcd. Each of them works alone, in any order, on a fresh Debian 12 with Rust, git, make and a C compiler.

CARGO  ?= cargo
ROUNDS ?= 3
SEEDS  ?= 100000
SEED   ?=
SCENARIOS ?=
MCD    := target/release/mcd

.DEFAULT_GOAL := help
.PHONY: help setup setup-lab build demo test lint bench lab soak soak-disk sim sim-mutants

help: ## say what there is
	@echo 'usage: make <target>'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)$$/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## install the Debian packages that are lacking (names them first; without root: names them only)
	@scripts/setup

setup-lab: setup ## the same for make lab; two of Debian's kernels go into target/lab
	@scripts/setup-lab

build: setup ## build target/release/mcd
	@$(CARGO) build --release --locked

demo: build ## protect a guest, kill its host ROUNDS times under load, check every reply
	@$(MCD) demo --rounds $(ROUNDS)

test: setup ## formatting, lints, documentation and every test
	@scripts/test

lint: setup ## the quick half of test: formatting, lints, documentation
	@scripts/lint

bench: build ## measure takeover, pauses and latency on this machine, and draw them; results in target/bench/
	@$(CARGO) build --release --locked --package mcd-bench
	@target/release/mcd-bench --mcd $(MCD)

lab: build setup-lab ## two virtual hosts with ordinary KVM, power cuts (SCENARIOS= only some); report in target/lab/
	@$(CARGO) build --release --locked --package mcd-lab
	@target/release/mcd-lab --mcd $(MCD) --dir target/lab $(SCENARIOS)

sim: ## run the protocol simulator over SEEDS seeds
	@SIM_SEEDS=$(SEEDS) $(CARGO) test --release --locked --test sim seeds -- --nocapture

sim-mutants: ## show that the simulator and the model checker find every deliberate bug
	@$(CARGO) test --release --locked --features mutants --test sim --test model mutant -- --nocapture

soak: build ## break pairs ROUNDS times in every way there is (SEED= repeats a run); report in target/soak/
	@$(CARGO) build --release --locked --package mcd-harness
	@target/release/mcd-harness --mcd $(MCD) --rounds $(if $(filter file,$(origin ROUNDS)),200,$(ROUNDS)) $(if $(SEED),--seed $(SEED)) --out target/soak

soak-disk: setup ## kill primaries ROUNDS times (and newcomers) while the guest writes to its disk; compare the images each time
	@MCD_REQUIRE_KVM=1 MCD_DISK_ROUNDS=$(if $(filter file,$(origin ROUNDS)),500,$(ROUNDS)) $(if $(SEED),MCD_DISK_SEED=$(SEED)) \
		$(CARGO) test --release --locked --test disk acknowledged_writes -- --nocapture
