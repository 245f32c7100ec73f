# Everything that one does with this project; `make help` lists it. It needs GNU make, Python >= 3.11 and pip.

PYTHON ?= python3
VENV   ?= .venv
STAMP  := $(VENV)/.installed

# uv or pip; and the build of torch that uv fetches (auto looks for an NVIDIA GPU; cpu, cu130, ... name one).
INSTALLER ?= uv
TORCH     ?= auto

SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The environment's tools come first: DVC stages and tests start `kedro` and `dvc` by name.
export PATH := $(abspath $(VENV))/bin:$(PATH)

# No tool sends usage data.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export ITERATIVE_DO_NOT_TRACK := 1
export KEDRO_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An absolute path: a relative one would follow the folder a command is started in.
DATABASE := sqlite:///$(CURDIR)/mlflow.db
UI_PORT  ?= 5000
BASE     ?= main

.PHONY: help install run repro ci sweep ui lint check format dvc-dependencies test coverage test-fast test-browser screenshots test-postgres test-sweep test-architectures test-damage test-faults \
	engines test-engines viz pipeline-picture bench-selection bench-selection-quality bench-number-formats bench-healing bench-peers bench-inference bench-runtime bench-serving bench-scale bench-workers bench-kills bench-plan cost-model bench-gpu lock clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

install: $(STAMP)  ## the environment, from the lock file (run and test do it themselves)

# Made again only when the lock file or the metadata changes. The lock file names every package, so none is chosen
# here; the project itself is installed without its dependencies.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"Python {v} is too old: 3.11 or newer is needed. Name one: make PYTHON=python3.11 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@.ci/install $(abspath $(VENV))/bin/python $(INSTALLER) $(TORCH)
	@touch $@

run: $(STAMP)  ## all pipelines: model and text in, compressed variants and their comparison out
	kedro run $(ARGS)
	@echo
	@echo "Report: data/09_comparison/index.html    Models: data/07_export/    MLflow UI: make ui, then http://127.0.0.1:$(UI_PORT)"

repro: $(STAMP)  ## the same through DVC, which computes only what has changed
	dvc repro $(ARGS)

ci: $(STAMP)  ## what CI does: repro, quality gates, figures against BASE (main) in data/09_comparison/summary.md
	.ci/compare $(BASE)

# The runs go to this database: an experiment of DVC's queue works in a folder that is thrown away.
SWEEP    ?= ewma50-fp8
SPARSITY ?= 0.4,0.5,0.6
GRIDS    ?= {grid:fp8_e4m3},{grid:int8},{grid:int4,group_size:64,method:coordinate_descent}
VARIANTS := conf/base/parameters_variants.yml

sweep: $(STAMP)  ## one variant over sparsity × bits, as DVC experiments and MLflow runs (SWEEP, SPARSITY, GRIDS choose)
	dvc exp run --queue -S '$(VARIANTS):variants.$(SWEEP).selection.sparsity=$(SPARSITY)' -S '$(VARIANTS):++variants.$(SWEEP).quantization=$(GRIDS)'
	MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-$(DATABASE)}" dvc exp run --run-all
	dvc exp show --only-changed
	@if dvc queue status | grep -w Failed; then \
	  echo "error: these failed. Read why: dvc queue logs NAME; forget them: dvc queue remove --failed" >&2; exit 1; fi

ui: $(STAMP)  ## the MLflow UI on what was logged (MLFLOW_TRACKING_URI names another store)
	@uri="$${MLFLOW_TRACKING_URI:-$(DATABASE)}"; \
	case "$$uri" in \
	  http://*|https://*) echo "A server holds the runs: open $$uri" ;; \
	  *) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri "$$uri" --host 127.0.0.1 --port $(UI_PORT) ;; \
	esac

# Triton's interpreter runs the CUDA kernels' tests without a GPU. Other systems than Linux skip them.
$(VENV)/.triton: $(STAMP)
	python -m pip install --quiet --editable '.[cuda]'
	@touch $@

# Two workers take little more than half the time of one, since most of it goes into starting Python. torch gets one
# thread in each: two would wait for each other. A file's tests stay together, and the longest file begins first.
SUITE := OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint $(VENV)/.triton  ## linters, types, and the whole test suite with the end-to-end run on the real model
	$(SUITE) $(ARGS)

# Measuring takes a fifth more time. pyproject.toml has the number that must be reached.
coverage: $(STAMP) $(VENV)/.triton  ## the whole test suite, and the lines and branches that it does not run
	$(SUITE) --cov --cov-report=
	coverage report --skip-covered --skip-empty --show-missing

$(VENV)/.browser: $(STAMP)
	python -m pip install --quiet --editable '.[browser]'
	@touch $@

test-browser: $(VENV)/.browser  ## the MLflow pages and the report in Chromium (needs a Chromium on the machine)
	pytest -m browser $(ARGS)

screenshots: $(VENV)/.browser  ## docs/images/mlflow_*.png from the runs in mlflow.db (needs a Chromium and `make run`)
	python -m tests.browser.screenshots --database $(DATABASE)

$(VENV)/.postgres: $(STAMP)
	python -m pip install --quiet --editable '.[postgres]'
	@touch $@

test-postgres: $(VENV)/.postgres  ## logging to a server on PostgreSQL (needs PostgreSQL on the machine)
	pytest -m postgres $(ARGS)

test-sweep: $(STAMP)  ## `make sweep` on a tiny model
	pytest -m sweep $(ARGS)

test-architectures: $(STAMP)  ## every architecture from fetch to export, some sixty tiny models (minutes)
	pytest -m "" tests/test_architectures.py $(ARGS)

# pip-audit is in an environment of its own: it must not change what is tested.
AUDIT := .audit
check: lint  ## linters and types, and the known vulnerabilities of the locked packages
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit==2.10.1; }
	@.ci/audit $(AUDIT)/bin/pip-audit

test-damage: $(STAMP)  ## 10,000 damaged files of every kind (minutes); writes benchmarks/results/damage.json
	python -m tests.damaged_files

# Mounting a small disk needs root, or the right to mount; without it these tests are skipped and say so.
test-faults: $(STAMP)  ## damaged files, full and read-only disks, kills, at every stage of a tiny model (minutes)
	OMP_NUM_THREADS=1 pytest -m "faults or not faults" tests/faults $(ARGS)

test-fast: $(STAMP)  ## the tests that take seconds
	pytest -m "not (slow or e2e or browser or engines or postgres or sweep or architectures or faults)" $(ARGS)

# Users' engines, each in an environment of its own: vLLM needs another transformers, and llama.cpp is compiled (g++,
# cmake; some minutes, once). Their locks name every package. vLLM's leaves out torchvision, torchaudio and torchcodec:
# their builds do not match this torch, and language models do not need them. The project is installed into vLLM's for
# its plugin, without its dependencies: vLLM wants other versions of some.
ENGINES := .engines

$(ENGINES)/%/.installed: benchmarks/engines/%.lock
	@echo "Installing the engine $* into $(ENGINES)/$*; this takes some minutes, once."
	@test -x $(ENGINES)/$*/bin/python || $(PYTHON) -m venv $(ENGINES)/$*
	@$(ENGINES)/$*/bin/python -m pip install --quiet --no-deps -r $<
	@test $* != vllm || $(ENGINES)/vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

engines: $(ENGINES)/vllm/.installed $(ENGINES)/llama/.installed  ## vLLM and llama.cpp, to check exports with

data/07_export/paper-2of4-fp8 data/07_export/2of4-int8.formats: | $(STAMP)
	kedro run

test-engines: $(STAMP) engines | data/07_export/paper-2of4-fp8  ## the exports of make run in transformers, vLLM, llama.cpp and ONNX Runtime
	pytest -m engines tests/engines $(ARGS)

lint: $(STAMP)  ## ruff and mypy (the import contracts run among the tests)
	ruff check
	ruff format --check
	mypy

format: $(STAMP)  ## fix what ruff can fix
	ruff check --fix
	ruff format

dvc-dependencies: $(STAMP)  ## write the code that each stage depends on into dvc.yaml, from the imports
	python -m tests.code_dependencies

# Kedro-Viz needs another ipython than the lock has. So it gets an environment, which sees the project's behind its own.
VIZ      := .kedro-viz
VIZ_PORT ?= 4141

$(VIZ)/.installed: $(STAMP)
	@echo "Installing Kedro-Viz into $(VIZ), once."
	@test -x $(VIZ)/bin/python || $(PYTHON) -m venv $(VIZ)
	@grep -v '^ipython==' requirements.lock > $(VIZ)/constraints.txt
	@$(VIZ)/bin/python -m pip install --quiet --constraint $(VIZ)/constraints.txt 'kedro-viz==12.5.0'
	@folder='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	{ $(VENV)/bin/python -c "$$folder"; echo $(CURDIR)/src; } > "$$($(VIZ)/bin/python -c "$$folder")/project.pth"
	@touch $@

viz: $(VIZ)/.installed  ## the pipelines in Kedro-Viz, to click through
	$(VIZ)/bin/kedro viz run --no-browser --host 127.0.0.1 --port $(VIZ_PORT)

pipeline-picture: $(VIZ)/.installed $(VENV)/.browser  ## docs/images/pipeline.png, by Kedro-Viz (needs a Chromium)
	python -m tests.browser.pipeline_picture --kedro $(VIZ)/bin/kedro

bench-selection: $(STAMP)  ## selection against sort, topk and a memory copy
	python -m benchmarks.selection $(ARGS)

bench-selection-quality: $(STAMP) data/03_primary/reference  ## perplexity after EWMA and after an exact sort, over sparsity and alpha
	python -m benchmarks.selection_quality $(ARGS)

bench-number-formats: $(STAMP) data/03_primary/reference  ## NVFP4 and MXFP4 by the library's rounding to nearest, by ours and by our descent
	python -m benchmarks.number_formats $(ARGS)

HEALED ?= 2of4-fp8 2of4-int4 ewma50-fp8
bench-healing: $(STAMP) | data/07_export/paper-2of4-fp8  ## sparse variants before and after healing, on three texts (HEALED narrows it; 20 minutes each)
	python -m benchmarks.healing --variants $(HEALED) $(ARGS)

data/03_primary/reference: | $(STAMP)
	kedro run --pipelines fetch,calibrate,reference

# The peers need another transformers, so they get an environment of their own.
PEERS := .peers
SAMPLES ?= 32 8 128
TASKS ?= 2of4 50 int4 2of4-int4 fp8 seven

$(PEERS)/.installed: benchmarks/peers/requirements.lock
	@echo "Installing the peers into $(PEERS); this takes some minutes, once."
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet -r $<
	@touch $@

data/02_intermediate/documents.parquet: | $(STAMP)
	kedro run --pipelines fetch

bench-peers: $(STAMP) $(PEERS)/.installed data/02_intermediate/documents.parquet  ## SparseGPT, Wanda and GPTQ beside ours (SAMPLES, TASKS narrow it)
	python -m benchmarks.peers --peers $(PEERS)/bin/python --samples $(SAMPLES) --tasks $(TASKS) $(ARGS)

bench-inference: $(STAMP) | data/07_export/paper-2of4-fp8  ## tokens a second of every variant in every engine that is there (make engines)
	python -m benchmarks.inference $(ARGS)

bench-runtime: $(STAMP) | data/07_export/2of4-int8.formats  ## packed 2:4 in transformers beside the dense model, and on a random one of 1.1 billion (ten minutes)
	python -m benchmarks.runtime $(ARGS)

MODELS ?= 1.1B
bench-scale: $(STAMP) | data/02_intermediate/documents.parquet  ## seconds and peak memory of each stage on random models (MODELS; ARGS=--blocks 4 for a part): an hour for 1.1B
	python -m benchmarks.scale --models $(MODELS) $(ARGS)

bench-workers: $(STAMP) | data/02_intermediate/documents.parquet  ## seconds of calibrate and compress against Dask's workers, and whether bytes change (fifteen minutes)
	python -m benchmarks.workers $(ARGS)

KILLS ?= 50
bench-kills: $(STAMP)  ## SIGKILL at KILLS random moments over all stages: bytes, left-overs, work lost (forty minutes for 50)
	python -m benchmarks.kills --kills $(KILLS) $(ARGS)

cost-model: $(STAMP)  ## what 7, 70 and 405 billion weights would take on this machine, planned (half a minute)
	python -m benchmarks.cost_model $(ARGS)

bench-plan: $(STAMP) | data/02_intermediate/documents.parquet  ## what `hwpq plan` says beside what is measured, four configurations (a quarter of an hour)
	python -m benchmarks.plan $(ARGS)

bench-serving: $(STAMP) $(ENGINES)/vllm/.installed | data/07_export/2of4-int8.formats  ## packed 2:4 in vLLM beside vLLM's own: decoding, prompts, quality (twenty minutes)
	python -m benchmarks.serving $(ARGS)

# PYTHON names the Python that has a CUDA build of torch; the project's own is not used, and nothing is installed.
bench-gpu:  ## compression and inference on a GPU beside its ceilings and rivals, in one call under ten minutes
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu $(ARGS)

# Freezes a fresh environment that pyproject.toml alone makes. Local version labels such as `+cpu` name a build that
# only some indexes have, so they are cut. A `name @ file` line would tie the lock to one machine: it is an error.
lock:  ## make requirements.lock anew from pyproject.toml
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip install --quiet --editable '.[dev]'; \
	"$$tmp/venv/bin/python" -m pip freeze --exclude-editable | sed -E 's/\+[A-Za-z0-9.]+$$//' > "$$tmp/lock"; \
	if grep ' @ ' "$$tmp/lock"; then echo "The lines above are tied to this machine: not locked." >&2; exit 1; fi; \
	{ echo "# Made by 'make lock' from pyproject.toml: the releases that were tested together. Do not edit."; \
	  cat "$$tmp/lock"; } > requirements.lock; \
	echo "requirements.lock: $$(grep -c == requirements.lock) packages"

clean:  ## remove the environment, caches and everything that the pipelines made (downloads and DVC's cache stay)
	rm -rf $(VENV) $(AUDIT) $(PEERS) $(ENGINES) $(VIZ) .coverage .coverage.* .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -rf src/*.egg-info build data/[01]* data/.scratch mlflow.db* mlartifacts mlruns
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
