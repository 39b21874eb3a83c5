# One page of commands. Needs python3 (3.10 to 3.13) with venv and pip; the demo data also needs npm and apt-get.
#   make setup PYTHON=python3.12        another interpreter
#   PIP_EXTRA_INDEX_URL=... make setup  any pip setting works through its environment variables

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test browser clients openapi bench-data prove-data bench-train prove-train bench-backdoor bench-detection prove-trust bench-serve prove-server prove-docs claims locks store prove-containers bench docs format clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

COMMA := ,

# $(call step,title,command): a heading, the command, the seconds it took. Join commands with `;`, not `&&`: under
# `set -e` a failure left of `&&` would not stop the recipe. A command with a comma needs a variable, as below.
step = @printf '\n== %s\n' '$(1)'; began=$$SECONDS; $(2); printf -- '-- %s: %d s\n' '$(1)' $$((SECONDS - began))

CHECK_PYTHON = $(PYTHON) -c 'import sys; v = sys.version.split()[0]; print("Python", v); \
	sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "needs Python 3.10 to 3.13: make setup PYTHON=python3.12")'
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --editable '.[serve,onnx,scan,detect,faiss,dev]'

help:  ## list the targets (default)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## create .venv and install the project into it, with all extras

# The stamp is written last, so an interrupted installation is taken up again; it is as old as the dependencies.
$(STAMP): pyproject.toml
	$(call step,virtual environment,$(CHECK_PYTHON); $(PYTHON) -m venv $(VENV))
	$(call step,install,$(INSTALL))
	@touch $@

DEMO ?=
demo: setup  ## fetch real data, train from scratch, evaluate, report, serve, ask (<= 12 minutes; DEMO=run.steps=100: less)
	$(call step,demo,$(BIN)/vlp demo --run-dir runs/demo $(DEMO))

test: setup clients browser  ## everything CI runs: format, lint, types, quick tests, wheel, wheel smoke
	$(call step,format,$(BIN)/ruff format --check .)
	$(call step,lint,$(BIN)/ruff check .)
	$(call step,types,$(BIN)/mypy)
	$(call step,test data,$(BIN)/vlp data fetch starter; $(BIN)/vlp data fetch towers; $(BIN)/vlp data fetch fashion-mnist)
	$(call step,quick tests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n auto --dist worksteal)
	$(call step,wheel,rm -rf dist; $(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .)
	$(call step,wheel smoke,$(BIN)/python tests/wheel_smoke.py dist/*.whl)
	@printf '\nmake test: all passed\n'

browser:  ## a Chromium for the tests of the web page where there is none, by apt-get as root
	$(call step,browser,if command -v chromium chromium-browser google-chrome-stable google-chrome; then :; \
	  elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then apt-get update -qq; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; \
	  else echo 'none here: install Chromium or the tests of the web page will fail'; fi)

# The peers' own demands on versions contradict ours, so each has a place of its own inside the environment.
PEERS = $(VENV)/peers
PEERS_STAMP = $(PEERS)/.ready

$(PEERS_STAMP): $(STAMP)
	$(call step,peers,$(BIN)/python -m pip install --disable-pip-version-check --editable '.[serve$(COMMA)dev$(COMMA)bench$(COMMA)fast-text]'; \
	  $(BIN)/python -m pip install --disable-pip-version-check --upgrade --no-deps --target $(PEERS)/open_clip webdataset==0.2.86; \
	  $(PYTHON) -m venv $(PEERS)/img2dataset; \
	  $(PEERS)/img2dataset/bin/python -m pip install --disable-pip-version-check img2dataset==1.47.0)
	@touch $@

CLIENTS = $(PEERS)/clients
CLIENTS_STAMP = $(CLIENTS)/.ready

clients: $(CLIENTS_STAMP)  ## others' clients in an environment of their own, for the tests that ask our server with them

# clip-retrieval without what it depends on: its client is one file, and the rest wants numpy 1.
$(CLIENTS_STAMP): $(STAMP)
	$(call step,other clients,$(PYTHON) -m venv $(CLIENTS); \
	  $(CLIENTS)/bin/python -m pip install --disable-pip-version-check 'cohere<7' langchain-openai langchain-cohere voyageai \
	    llama-index-embeddings-jinaai llama-index-embeddings-openai-like llama-index-embeddings-cohere \
	    llama-index-embeddings-text-embeddings-inference; \
	  $(CLIENTS)/bin/python -m pip install --disable-pip-version-check --no-deps clip-retrieval==2.45.0)
	@touch $@

openapi:  ## accept the interface as it is now: writes tests/golden/openapi.json
	VLP_ACCEPT=1 $(BIN)/python -m pytest -q tests/server/test_app.py -k openapi

docs: setup  ## write the generated parts of the README again: commands, recipes, picture, tables of figures
	$(call step,README,$(BIN)/python tests/benchmarks/readme_parts.py)

bench: bench-data bench-train claims bench-detection bench-backdoor bench-serve docs  ## all figures of the README (about ten hours)

ROWS ?=
ONLY ?=
NAMES ?= all
bench-data: $(PEERS_STAMP)  ## the figures of the data path against their peers (about 40 minutes; ROWS=a,b for some)
	$(call step,data path,$(BIN)/python tests/benchmarks/bench_data.py --rows "$(ROWS)")

bench-train: $(PEERS_STAMP)  ## the figures of the trainer against open_clip's (about 60 minutes; ROWS=a,b for some)
	$(call step,trainer,$(BIN)/python tests/benchmarks/bench_train.py --rows "$(ROWS)")

# infinity's torchvision is built for CUDA; tests/benchmarks/peer_infinity.py says what it takes to import it here.
SERVE_STAMP = $(PEERS)/.serve
$(SERVE_STAMP): $(STAMP)
	$(call step,peers of the server,$(BIN)/python -m pip install --disable-pip-version-check --editable '.[serve$(COMMA)dev$(COMMA)onnx$(COMMA)openvino]'; \
	  $(PYTHON) -m venv $(PEERS)/stores; \
	  $(PEERS)/stores/bin/python -m pip install --disable-pip-version-check faiss-cpu==1.15.1 lancedb==0.40.0 milvus-lite==3.2.2 pymilvus==3.0.2; \
	  $(PYTHON) -m venv $(PEERS)/infinity; \
	  $(PEERS)/infinity/bin/python -m pip install --disable-pip-version-check 'infinity-emb[server$(COMMA)torch$(COMMA)vision]==0.0.78' 'transformers<4.48' aiohttp)
	@touch $@

bench-serve: $(SERVE_STAMP)  ## the figures of the server against its peers (about 40 minutes; ROWS=embedding,search,overload)
	$(call step,server,$(BIN)/python tests/benchmarks/bench_serve.py --rows "$(ROWS)")

claims: setup  ## every claim with three seeds, and both tables of the README (about 10 minutes each; NAMES="a b" for some)
	$(call step,claims,$(BIN)/vlp claims run $(NAMES))
	$(call step,tables,$(BIN)/vlp claims table --readme README.md > /dev/null)

# Its demands on versions contradict those of s3fs.
S3_STAMP = $(PEERS)/moto/.ready
store: $(S3_STAMP)  ## an S3 server in an environment of its own, for the proofs with object stores
$(S3_STAMP): $(STAMP)
	$(call step,S3 server,$(BIN)/python -m pip install --disable-pip-version-check --editable '.[serve$(COMMA)dev$(COMMA)s3]'; \
	  $(PYTHON) -m venv $(PEERS)/moto; $(PEERS)/moto/bin/python -m pip install --disable-pip-version-check 'moto[server]')
	@touch $@

prove-train: $(S3_STAMP)  ## the slow proofs of the trainer: kills, signals, damage, all towers (about 30 minutes; ONLY=a_name)
	$(call step,proofs,$(BIN)/python tests/benchmarks/prove.py train --only "$(ONLY)")

bench-detection: setup  ## detection-oriented pretraining and open-vocabulary detection, three seeds (about three hours; goes on)
	$(call step,detection,$(BIN)/python tests/benchmarks/bench_detection.py)

bench-backdoor: setup  ## attacks and defences, six triggers with three seeds (about four hours; goes on where it stopped)
	$(call step,backdoors,$(BIN)/python tests/benchmarks/bench_backdoor.py)

prove-data: $(S3_STAMP)  ## the slow proofs of sharding and streaming: kills, faults, resume on other ranks (about 30 minutes)
	$(call step,Ray,$(BIN)/python -m pip install --disable-pip-version-check --editable '.[serve$(COMMA)dev$(COMMA)ray$(COMMA)s3]')
	$(call step,proofs,$(BIN)/python tests/benchmarks/prove.py data --only "$(ONLY)")

FUZZ_STAMP = $(PEERS)/fuzz/.ready
$(FUZZ_STAMP): $(STAMP)
	$(call step,fuzzers,$(PYTHON) -m venv $(PEERS)/fuzz; \
	  $(PEERS)/fuzz/bin/python -m pip install --disable-pip-version-check schemathesis==4.32.5; \
	  $(PEERS)/fuzz/bin/python -m pip install --disable-pip-version-check atheris || echo 'no atheris for this Python: the campaign parsers will fail')
	@touch $@

PROOFS ?=
prove-server: $(FUZZ_STAMP)  ## the slow proofs of the server: fuzzing, hostile input, kills, signals (about an hour; PROOFS="kills=20 images")
	$(call step,proofs,$(BIN)/python tests/benchmarks/prove_server.py $(PROOFS))

TRUST ?= --help
prove-trust: setup  ## proofs with a model of one's own that has a backdoor (TRUST="dirty BUNDLE TRUTH DATA", natural, noisy, http, latency, scale)
	$(call step,proofs,$(BIN)/python tests/benchmarks/prove_trust.py $(TRUST))

prove-docs: setup  ## every command block of the README, typed in a copy of this checkout (about 20 minutes; ONLY=Train,Serve)
	$(call step,README,$(BIN)/python tests/benchmarks/prove_docs.py --only "$(ONLY)")

prove-containers: $(S3_STAMP)  ## images built without an engine, run as nobody; a cluster that loses a host (as root; 15 minutes)
	$(call step,tools,command -v debootstrap ip nsenter > /dev/null || apt-get install -y -qq debootstrap iproute2 util-linux)
	$(call step,proofs,$(BIN)/python tests/benchmarks/prove.py containers --only "$(ONLY)")

# uv in a place of its own. CPU locks name PyTorch's CPU builds, which need UV_FIND_LINKS or UV_INDEX to be found.
LOCK = $(PEERS)/uv/bin/uv pip compile --quiet --upgrade --generate-hashes --only-binary :all: --no-annotate \
	--custom-compile-command 'make locks' --no-emit-index-url --no-emit-find-links \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28
CPU = <(sed -n 's/^torch==\([0-9.]*\).*/torch==\1+cpu/p' docker/requirements-train-cuda.txt)

# $(call lock,name,extras): both kinds of one image; that for CUDA from the default index alone
lock = env -u UV_FIND_LINKS -u UV_INDEX $(LOCK) pyproject.toml $(2) --output-file docker/requirements-$(1)-cuda.txt; \
  $(LOCK) pyproject.toml $(2) --constraint $(CPU) --output-file docker/requirements-$(1)-cpu.txt

locks:  ## what images install, resolved anew: docker/requirements-*.txt with hashes
	$(call step,uv,$(PYTHON) -m venv $(PEERS)/uv; $(PEERS)/uv/bin/pip install --disable-pip-version-check --quiet uv)
	$(call step,build and shard,$(LOCK) docker/requirements-build.in --output-file docker/requirements-build.txt; \
	  $(LOCK) docker/requirements-shard.in --output-file docker/requirements-shard.txt)
	$(call step,train,$(call lock,train,--extra s3 --extra detect --extra scan))
	$(call step,serve,$(call lock,serve,--extra serve --extra openvino))
	$(call step,ray,$(call lock,ray,docker/requirements-ray.in --extra ray --extra s3))

format:  ## rewrite the sources as `make test` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment, build output and tool caches; runs/ and the data cache stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
