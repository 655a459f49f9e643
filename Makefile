# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
# Most of the tests keep one core busy at a time: they run in as many processes, each with one thread, file by file, not
# those with the most tests first: the kernels' files have few that take long, and would be the last.
JOBS ?= 2
IN_PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow test-gpu test-oldest lint kernels format benchmark clean

help:
	@echo "make demo [ARGS=--quick]  upcycle, fine-tune, save, reload and use a real model"
	@echo "make test                 lint, types, kernels and the tests, with coverage"
	@echo "make test-slow            tests that take minutes or several processes"
	@echo "make test-gpu             tests that need a GPU"
	@echo "make test-oldest          the tests with the oldest supported transformers and peft"
	@echo "make lint | format        ruff and mypy | ruff's formatter"
	@echo "make kernels              compile the kernels for four GPUs, without one, and show their registers"
	@echo "make benchmark            compare with transformers and PEFT, and measure the rest (more than an hour)"

demo: $(VENV)/.installed
	$(BIN)/deepseekmoe demo $(ARGS)

test: lint kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-fail-under=95 $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Without the tests that handle files and processes alone, those of plans, of routing and of kernels, in which no version
# of transformers has a part, and without those of torch.compile: torch is the same. The Hub's client is an older one too.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(IN_PARALLEL) \
		--ignore tests/test_conversion_files.py --ignore tests/test_conversion_resume.py --ignore tests/test_planning.py \
		--ignore tests/test_routing.py --ignore tests/test_routing_triton.py --ignore tests/test_experts_triton.py \
		-k "not compiled" $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel for every target, with its registers; fails where one spills.
kernels: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/compile_kernels.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/against_transformers.py
	$(BIN)/python benchmarks/expert_lora.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/sharded_training.py
	$(BIN)/python benchmarks/balancing_overhead.py
	$(BIN)/python benchmarks/balancing.py

# torch comes first and alone, so that the constraint decides its version before anything else asks for one. Which
# build pip takes, for a GPU or for the CPU, is for pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL).
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
