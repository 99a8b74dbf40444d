# Every target sets up what it needs by itself: a virtual environment in .venv with pinned versions.
#   make demo     the whole story on real data, in about a minute
#   make serve    an exchange that stays up (ROOT=, PORT=)
#   make test     all tests          make check    format, lint, types, layers, ratchets
#   make noninterference   many more random policies than the tests try (EXAMPLES=)
#   make bench    measure against peers, write bench/RESULTS.md
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
ROOT ?= headrace-data
PORT ?= 7070
EXAMPLES ?= 400
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := src tests examples scripts bench

export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check noninterference serve bench services format clean

help:
	@sed -n '2,6s/^# *//p' Makefile

$(BIN)/python: scripts/setup.sh
	@sh scripts/setup.sh $(VENV)

.stamps/installed: constraints.txt pyproject.toml | $(BIN)/python
	@mkdir -p .stamps
	@echo "Installing pinned dependencies into $(VENV) (a few minutes the first time)"
	@# torch goes first and alone, so that a machine's own index decides which build of the pinned version it gets
	@$(PIP) install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install --quiet -c constraints.txt -e '.[server,torch,dev]'
	@touch $@

.stamps/strace:
	@mkdir -p .stamps
	@if command -v strace >/dev/null 2>&1; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		apt-get update -qq && apt-get install -y -qq strace >/dev/null && touch $@; \
	else echo "strace is not here: the test that watches fsync under strace will say so and skip"; fi

demo: .stamps/installed
	@$(BIN)/python examples/demo.py

serve: .stamps/installed
	@exec $(BIN)/headrace serve --root $(ROOT) --port $(PORT)

test: .stamps/installed .stamps/strace
	@$(BIN)/python -m pytest -n 2 $(PYTEST)

noninterference: .stamps/installed
	@HEADRACE_NONINTERFERENCE_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/test_noninterference.py

check: .stamps/installed
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/ratchets.py

format: .stamps/installed
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

services:
	@echo "The embedded exchange needs no service beside it; nothing to start."

.stamps/bench: .stamps/installed bench/requirements.txt
	@sh scripts/setup.sh bench/.venv
	@bench/.venv/bin/python -m pip --disable-pip-version-check install --quiet -r bench/requirements.txt
	@if command -v wrk >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then apt-get update -qq && apt-get install -y -qq wrk >/dev/null; \
	elif command -v brew >/dev/null 2>&1; then brew install --quiet wrk; \
	else echo "wrk is not here: install it to measure uploads"; fi
	@touch $@

bench: .stamps/bench
	@$(BIN)/python bench/run.py

clean:
	rm -rf $(VENV) bench/.venv .stamps .data .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
	find src tests bench examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
