# SPDX-License-Identifier: GPL-2.0-or-later
# make demo   show the whole thing on this machine, in about a minute with the Python environment that it first makes
# make window-demo  show the window over a lab with forwards and traffic, until it is closed
# make test   run every test (as root also those in network namespaces)
# make check  format, lint and types
# make pictures  take the pictures of the window for README and guide
# make guide  write what the commands of docs/guide print into its chapters, and qvm-forward-json(7) from its schema
# make bench  measure against socat, side by side; with ARGS=admin what dom0 takes with many rules; with ARGS=nft,
#             as root, forwards by nft beside rules by hand; with ARGS=udp, as root, UDP over qrexec beside socat and nft;
#             with ARGS=window how long the window's main loop is held up with many rules
# make bench-quick  has something become slower? Ratios beside a run that is stored, in under a minute
# make bench-all  all runs that docs/numbers.md shows, in about ten minutes; with ARGS=NAME,... some of them
# make numbers  make its tables and pictures of the runs again
# make fuzz   give the mux protocol bytes, guided by coverage, for SECONDS (60)
# make mutate change the code in 200 places, one at a time, and see whether the tests notice (ARGS="--count 60 mux")
# make soak   connect, end, abort, stall and kill at random for SECONDS (600), beside the direct connection;
#             with ARGS=udp do it with datagrams, and account for each that is missing;
#             with ARGS=nft, as root, open and close forwards by nft at random beside live traffic
# make translations  bring the catalogues of po/ up to date with the texts of the window
# make packages  build the Debian packages and the RPMs, and as root run what they install in a clean Debian

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest-trio
# Two processes for each CPU, as a test waits for half of its time; ARGS=-n0 runs the tests one after another, as
# --pdb needs it.
PARALLEL := -n $(shell expr 2 \* $$(nproc)) --dist worksteal
# What imports trio, and the doors over all of it.
TRIO_TESTS := tests/exposed tests/lab tests/relay tests/target tests/test_endings.py \
	$(wildcard tests/test_listener*.py tests/test_service*.py)
# What the window and its tests need of Debian, since PyGObject is not built here.
GTK := python3-gi gir1.2-gtk-3.0 gir1.2-atspi-2.0 at-spi2-core dbus xvfb xdotool trayer
# The one program in C, where a lab finds it. Without a compiler each call of a lab is a program of its own.
HANDOVER := $(if $(shell command -v cc),$(VENV)/bin/qubes-forward-handover)
export PYTHON
# The tests start some 2,000 programs, and without bytecode each of them, and each process of the tests, compiles anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo window-demo test test-oldest-trio check format guide pictures bench bench-quick bench-all numbers fuzz mutate soak translations build/locale packages clean

demo: $(VENV)/.installed $(HANDOVER)
	@tools/debian-packages --optional nftables iproute2
	@$(VENV)/bin/qvm-forward-lab demo

# As an installed window finds icons and catalogues.
window-demo: $(VENV)/.installed $(HANDOVER) build/locale
	@tools/debian-packages --optional python3-gi gir1.2-gtk-3.0 adwaita-icon-theme
	@XDG_DATA_DIRS="$(CURDIR):$${XDG_DATA_DIRS:-/usr/local/share:/usr/share}" QUBES_FORWARD_LOCALE=build/locale \
		$(VENV)/bin/qvm-forward-lab window

test: $(VENV)/.dev $(HANDOVER)
	@tools/debian-packages --optional socat nftables iproute2 tmux zsh gettext $(GTK)
	@# The first time, pytest compiles the tests once, and not in each of its processes.
	@[ -d tests/__pycache__ ] || $(VENV)/bin/python -m pytest --quiet --collect-only >/dev/null || true
	$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

# Of the rest no line runs otherwise with another trio.
test-oldest-trio: $(OLDEST)/.dev
	@tools/debian-packages --optional socat nftables iproute2 tmux zsh
	$(OLDEST)/bin/python -m pytest $(PARALLEL) $(or $(ARGS),$(TRIO_TESTS))

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# A test holds the chapters against this; git diff shows what a change does to what users read.
guide: $(VENV)/.dev
	$(VENV)/bin/python tests/guide.py
	$(VENV)/bin/python tools/jsonpage.py

pictures: $(VENV)/.dev build/locale
	@tools/debian-packages $(GTK) imagemagick fonts-dejavu-core adwaita-icon-theme
	@$(VENV)/bin/python tests/window/pictures.py $(ARGS)

bench: $(VENV)/.dev $(HANDOVER)
	$(VENV)/bin/python -m bench $(ARGS)

bench-quick: $(VENV)/.dev $(HANDOVER)
	$(VENV)/bin/python -m bench guard $(ARGS)

bench-all: $(VENV)/.dev $(HANDOVER)
	@tools/debian-packages --optional socat
	$(VENV)/bin/python -m bench all $(ARGS)

numbers: $(VENV)/.dev
	$(VENV)/bin/python -m bench page

$(VENV)/bin/qubes-forward-handover: handover/qubes-forward-handover.c $(VENV)/.installed
	$(CC) -O2 -Wall -Wextra -o $@ $<

# What is found is kept in build/fuzz, and so is what was learned: the next run begins with it.
fuzz: $(VENV)/.fuzz
	mkdir -p build/fuzz/corpus
	$(VENV)/bin/python tests/fuzz/fuzz_mux.py $(or $(SECONDS),60) -artifact_prefix=build/fuzz/ build/fuzz/corpus $(ARGS)

mutate: $(VENV)/.mutate
	$(VENV)/bin/python tools/mutate.py $(ARGS)

soak: $(VENV)/.installed $(HANDOVER)
	$(VENV)/bin/python -m soak --seconds $(or $(SECONDS),600) $(ARGS)

translations:
	@tools/translations

# The catalogues as a program in this checkout finds them, with QUBES_FORWARD_LOCALE=build/locale.
build/locale: $(patsubst po/%.po,build/locale/%/LC_MESSAGES/qubes-fwd-qrexec.mo,$(wildcard po/*.po))

build/locale/%/LC_MESSAGES/qubes-fwd-qrexec.mo: po/%.po
	@tools/debian-packages gettext
	@mkdir -p $(@D)
	@msgfmt --check --output-file=$@ $<

packages:
	@tools/packages $(SUITE)

clean:
	rm -rf $(VENV) $(OLDEST) .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info

$(VENV)/.installed: pyproject.toml
	@tools/environment $(VENV) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml
	@tools/environment $(VENV) -e '.[dev]'
	@# The types of GTK, for mypy; what they describe comes from the distribution.
	@tools/environment $(VENV) --no-deps --config-settings=config=Gtk3,Gdk3 'pygobject-stubs>=2.8'
	@touch $@ $(VENV)/.installed

$(VENV)/.fuzz: pyproject.toml
	@tools/environment $(VENV) -e '.[fuzz]'
	@touch $@ $(VENV)/.installed

$(VENV)/.mutate: pyproject.toml
	@tools/environment $(VENV) -e '.[dev,mutate]'
	@touch $@ $(VENV)/.dev $(VENV)/.installed

# The oldest trio that is supported: Debian 12 has it, and so do the templates made from it.
$(OLDEST)/.dev: pyproject.toml
	@tools/environment $(OLDEST) -e '.[dev]' 'trio==0.22.0'
	@touch $@
