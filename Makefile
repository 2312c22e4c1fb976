# Everything runs in .venv, which tools/bootstrap.py makes. PYTHON=… chooses another interpreter, PYTEST_ARGS=… adds
# options to pytest, FUZZ_SECONDS=… is the time of each fuzz target.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
endif
PYTEST_ARGS ?=
# Tests that run at a time. Most of them wait for a process or a socket, so two to a processor keep it busy.
JOBS ?= $(shell echo $$(( 2 * $$(nproc) )))
FUZZ_SECONDS ?= 60

BIN := .venv/bin
BOOTSTRAP := $(PYTHON) tools/bootstrap.py
PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := -n $(JOBS) --dist worksteal
# A guest under emulation keeps one processor busy, so there is one for each, and nothing else beside them: what is late
# then would be called a failure. A module's guests share what was booted, so a module stays together. A latency is worth
# nothing beside anything else. pytest says 5 where PYTEST_ARGS leaves nothing of one part.
GUESTS ?= $(shell nproc)
GUEST_TO_A_PROCESSOR := -n $(GUESTS) --dist loadfile
GUESTS_LIVE := -o testpaths=tests/vm
A_GUEST := vm and not long
ALONE := vm or hostile
OR_NONE := || [ $$? -eq 5 ]
BESIDE_OTHERS := not (long or $(ALONE))
# Budgets of real time are part of what many tests check, and a machine that stands still for half a second breaks them.
# So what fails beside others is judged alone; both outcomes are shown. Options and marks of the part are its arguments.
OR_ALONE = || { code=$$?; [ $$code -eq 5 ] || { [ $$code -eq 1 ] && \
  echo "make test: what failed beside other tests runs once more, alone; this run judges" && \
  $(PYTEST) $(1) --last-failed --last-failed-no-failures=none --maxfail=3 -m "$(2)" $(PYTEST_ARGS); }; }
# Tests start our programs hundreds of times. Where nothing compiled is kept, half of each start is compiling.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-vm guest test test-fast test-vm-long check conformance fuzz bench scale vm-assets proto deb oci docs pages clean venv venv-demo venv-dev venv-docs venv-fuzz

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## see it work without a VMM: NVMe I/O migrates to another host and back, verified
	@echo "make demo: 1. makes .venv, if it is not there (half a minute); 2. migrates NVMe I/O there and back (half a minute)"
	@$(MAKE) --no-print-directory venv-demo
	$(BIN)/vfiouser-oob demo

demo-vm: venv-dev vm-assets ## see it work with a VM: a Linux guest moves to another, unmodified QEMU and back under I/O
	PYTHONPATH=.:protocol:agents:tests/support $(BIN)/python -m vmbed.demo

guest: venv-dev vm-assets ## boot a Linux guest in stock QEMU on a function: make guest SOCKET=/tmp/nvme0.sock
	@PYTHONPATH=.:protocol:agents:tests/support $(BIN)/python -m vmbed.shell $(SOCKET)

test: venv-dev vm-assets ## run all tests, those in virtual machines too
	$(PYTEST) $(SIDE_BY_SIDE) -m "$(BESIDE_OTHERS)" $(PYTEST_ARGS) $(call OR_ALONE,,$(BESIDE_OTHERS))
	$(PYTEST) $(GUEST_TO_A_PROCESSOR) $(GUESTS_LIVE) -m "$(A_GUEST)" $(PYTEST_ARGS) $(call OR_ALONE,$(GUESTS_LIVE),$(A_GUEST))
	$(PYTEST) -o testpaths=tests/hostile -m "hostile and not long" $(PYTEST_ARGS) $(OR_NONE)

test-fast: venv-dev ## run what takes five minutes: no virtual machines, no attacks, no slow tests
	$(PYTEST) $(SIDE_BY_SIDE) -m "not (slow or $(ALONE))" $(PYTEST_ARGS)

test-vm-long: venv-dev ## run the VM tests that take minutes: nested Linux, the oldest kernel, an own one with iommufd
	PYTHONPATH=tests/support $(BIN)/python -m vmbed.assets --long
	$(PYTEST) -m long $(PYTEST_ARGS)

check: venv-dev ## lint, formatting, types, import rules, spelling, prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/prose.py
	$(BIN)/python tools/prose_code.py

conformance: venv-dev ## judge the daemon with the conformance suite, and prove that the suite bites
	$(PYTEST) tests/conformance $(PYTEST_ARGS)

fuzz: venv-fuzz ## feed whatever reads a peer's bytes with generated ones, for minutes; steered by coverage
	PYTHONPATH=.:protocol:agents:tests/support $(BIN)/python -m fuzzkit.rounds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

bench: venv ## measure the daemon on this machine
	$(BIN)/vfiouser-oob bench

scale: venv-dev ## measure many functions, and write figures and curves into docs/explanation; minutes on an idle machine
	mkdir -p build
	$(BIN)/vfiouser-oob bench --scale --json > build/scale.json
	mv build/scale.json docs/explanation/scale.json
	$(BIN)/python tools/scale_page.py

vm-assets: venv-dev ## fetch QEMU and a guest for the VM tests from this machine's Debian archive (cached)
	PYTHONPATH=tests/support $(BIN)/python -m vmbed.assets

proto: venv-dev ## compile the .proto of the gRPC agents again, after it was changed
	$(BIN)/python tools/protoc.py

deb: venv-dev ## build the packages for Debian 12 and 13, into dist; lintian checks them where it is installed
	$(BIN)/python tools/make_deb.py --lint $(DEB_ARGS)

# Only Docker's format of images has a place for the health check.
oci: ## build a container image with podman, buildah or docker, whichever is there
	@builder=$$(command -v podman || command -v buildah || command -v docker) || \
	  { echo "make oci: none of podman, buildah and docker is here" >&2; exit 1; }; \
	case $$builder in */docker) format= ;; *) format="--format docker" ;; esac; \
	set -x; $$builder build $$format -t vfiouser-oob -f packaging/Containerfile $(OCI_ARGS) .

docs: venv-docs ## build the documentation site into build/docs; a warning, or a link that leads nowhere, is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "make docs: build/docs/index.html"

pages: venv-dev ## write the reference pages that are made from declarations
	$(BIN)/python tools/messages_page.py
	$(BIN)/python tools/config_page.py
	$(BIN)/python tools/verbs_page.py
	$(BIN)/python tools/metrics_page.py
	$(BIN)/python tools/rooms_map.py
	$(BIN)/python tools/scale_page.py
	$(BIN)/python tools/help_texts.py

clean: ## remove what make made, except the downloads in .cache
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.cache/*' -prune -exec rm -rf {} +

venv:
	@$(BOOTSTRAP)

venv-demo:
	@$(BOOTSTRAP) --extra demo

venv-dev:
	@$(BOOTSTRAP) --extra test --extra check

venv-docs:
	@$(BOOTSTRAP) --extra docs

venv-fuzz:
	@$(BOOTSTRAP) --extra test --extra check --extra fuzz
