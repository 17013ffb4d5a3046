# Two commands on a fresh machine: `make demo` and `make test`. `make app` shows what the first one has trained.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where there is no NVIDIA GPU, the release whose CPU build suffices; else the newest that setup.cfg allows.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
# `make test LOCKED=1` installs the very versions of requirements.lock, checked by their hashes. Only PyTorch is not
# there, because its builds for CPU and GPU differ.
LOCKED ?=

.PHONY: demo app test pytest test-long test-transformers fuzz quality lock benchmark table clean

demo: $(VENV)/installed  ## The whole pipeline on a phantom, published to a Hub on this machine (about 5 minutes).
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

app: $(VENV)/installed demo/run  ## A web page that predicts scans with the checkpoint of `make demo`; it prints its address.
	$(BIN)/python -m app --model demo/run

demo/run:
	@$(MAKE) demo

test: $(VENV)/installed  ## Style, types, doctests and tests.
	@# mypy takes a minute of one processor, which may as well be during the tests.
	@$(MAKE) --no-print-directory --jobs 2 quality pytest

pytest: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20

test-long: $(VENV)/installed  ## The tests that are too long for `make test`: reference runs, tables, trainings with FSDP.
	$(BIN)/python -m pytest -m long --numprocesses auto --maxprocesses 4 --dist worksteal

test-transformers: $(VENV)/installed  ## What depends on transformers, at the lowest and the highest release that setup.cfg allows.
	bash tests/support/test_transformers.sh $(BIN)/python

fuzz: $(VENV)/installed  ## Hostile input: CASES cases (25,000), each a clear error or a right result.
	$(BIN)/python -m tests.fuzz $(if $(CASES),--cases $(CASES))

quality: $(VENV)/installed  ## Style, types, and known vulnerabilities of the packages in requirements.lock.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.support.audit

lock: $(VENV)/installed  ## requirements.lock, anew: the newest versions that setup.cfg allows, with hashes.
	@# PyTorch is left out, and networkx is something that only PyTorch needs.
	echo 'torch; python_version < "3"' > $(VENV)/without_torch.txt
	echo networkx | $(BIN)/uv pip compile --quiet setup.cfg - --extra test --universal --python-version 3.11 --upgrade --generate-hashes \
		--override $(VENV)/without_torch.txt --custom-compile-command "make lock" --output-file requirements.lock

benchmark: $(VENV)/installed  ## The tables of benchmarks/README.md, anew; NAMES="gpu learning" chooses some, the long ones too.
	$(BIN)/python -m benchmarks $(NAMES)

table: $(VENV)/installed  ## Train the recipes on DATASET and write the results table; see docs/training.md for RECIPES, FOLDS, FLAGS.
	$(BIN)/python -m gi_segmentation.table --dataset_name $(or $(DATASET),gi_tract) \
		$(if $(RECIPES),--recipes $(RECIPES)) $(if $(FOLDS),--folds) $(if $(FLAGS),-- $(FLAGS))

$(VENV)/installed: setup.cfg pyproject.toml $(if $(LOCKED),requirements.lock)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) uv
	@# uv is several times as fast as pip, and leaves PyTorch as it is. Unlike pip, it compiles the packages only if it is
	@# told to. Otherwise the first import would, or every one if PYTHONDONTWRITEBYTECODE is set.
ifdef LOCKED
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --editable .
else
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable .[test]
endif
	touch $@

clean:  ## Remove what make made.
	rm -rf $(VENV) .transformers demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
