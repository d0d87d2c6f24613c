# The doors of mcd. Each of them works alone, in any order, on a fresh Debian 12 with Rust, git, make and a C compiler.

CARGO  ?= cargo
ROUNDS ?= 3
SEEDS  ?= 100000
SEED   ?=
MCD    := target/release/mcd

.DEFAULT_GOAL := help
.PHONY: help setup build demo test lint bench soak sim sim-mutants

help: ## say what there is
	@echo 'usage: make <door>'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)$$/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## install the Debian packages that are lacking (told before; without root: named only)
	@scripts/setup

build: setup ## build target/release/mcd
	@$(CARGO) build --release --locked

demo: build ## protect a guest, kill its host ROUNDS times under load, check every reply
	@$(MCD) demo --rounds $(ROUNDS)

test: setup ## formatting, lints, documentation and every test
	@scripts/test

lint: setup ## the quick half of test: formatting, lints, documentation
	@scripts/lint

bench: build ## measure takeover, pauses and latency on this machine; results in target/bench/
	@scripts/bench $(MCD)

sim: ## run the protocol simulator over SEEDS seeds
	@SIM_SEEDS=$(SEEDS) $(CARGO) test --release --locked --test sim seeds -- --nocapture

sim-mutants: ## show that the simulator and the model checker find every deliberate bug
	@$(CARGO) test --release --locked --features mutants --test sim --test model mutant -- --nocapture

soak: build ## break pairs ROUNDS times in every way there is (SEED= repeats a run); report in target/soak/
	@$(CARGO) build --release --locked --package mcd-harness
	@target/release/mcd-harness --mcd $(MCD) --rounds $(if $(filter file,$(origin ROUNDS)),200,$(ROUNDS)) $(if $(SEED),--seed $(SEED)) --out target/soak
