# SPDX-License-Identifier: Apache-2.0
# Thin: the work is in scripts/. `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo test box e2e bench lint docs wheel clean
PYTEST_ARGS ?=

help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## Debian packages and .venv: all that the other targets need (installs only what is missing)
	@scripts/setup

demo: setup ## two VMs, a million checked packets through them, a summary in build/demo.json
	@scripts/demo

test: setup ## C tests with sanitizers, then Python: unit, property, model, integration, vm
	@scripts/test $(PYTEST_ARGS)

box: ## the guests' box for Vagrant, from Debian packages, in the cache
	@scripts/setup e2e
	@scripts/box

e2e: ## box, vagrant up, ansible, traffic through the guests, checks, vagrant destroy: all on this host
	@scripts/setup e2e
	@scripts/e2e

bench: ## the figures of docs/performance.md, in build/bench/
	@scripts/setup bench
	@scripts/bench

lint: ## ruff, mypy, ansible-lint, compiler warnings of gcc and clang as errors, licence lines
	@scripts/setup lint
	@scripts/lint

docs: ## the documentation as HTML in build/docs, warnings as errors
	@scripts/setup docs
	@scripts/docs

wheel: ## the release files in dist/, made twice and compared
	@scripts/setup release
	@scripts/wheel

clean: ## removes build/, .venv and caches of tools
	@scripts/clean
