# SPDX-License-Identifier: GPL-2.0-or-later
# make demo   show the whole thing on this machine, in under a minute
# make test   run every test (as root also those in network namespaces)
# make check  format, lint and types
# make bench  measure against socat, side by side

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest-trio
export PYTHON

.PHONY: demo test test-oldest-trio check format bench clean

demo: $(VENV)/.installed
	@tools/debian-packages --optional iproute2
	@$(VENV)/bin/qvm-forward-lab demo

test: $(VENV)/.dev
	@tools/debian-packages --optional socat nftables iproute2
	$(VENV)/bin/python -m pytest $(ARGS)

test-oldest-trio: $(OLDEST)/.dev
	@tools/debian-packages --optional socat nftables iproute2
	$(OLDEST)/bin/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.installed
	$(VENV)/bin/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info

$(VENV)/.installed: pyproject.toml
	@tools/environment $(VENV) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml
	@tools/environment $(VENV) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# The oldest trio that is supported: Debian 12 has it, and so do the templates made from it.
$(OLDEST)/.dev: pyproject.toml
	@tools/environment $(OLDEST) -e '.[dev]' 'trio==0.22.0'
	@touch $@
