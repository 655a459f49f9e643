# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
# Most of the tests keep one core busy at a time: they run in as many processes, each with one thread, file by file, not
# those with the most tests first: the kernels' files have few that take long, and would be the last.
JOBS ?= 2
IN_PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What a version of transformers, PEFT or the Hub's client can have a part in; the rest is tested with the newest alone:
# conversion, plans, routing and kernels know nothing of them, and torch, which compiles, is the same.
OF_VERSIONS = $(foreach name,canaries canaries_of_others generation golden modeling checkpoints registration configuration experts lora lora_combining \
	lora_adapters lora_options adapters adapter_layouts adapter_training foreign_adapters esft trainer trl trl_trainers callbacks \
	mtp mtp_training mtp_generation moe_layers deepseek_v32_v4 copies depth quantisers tokenization upcycling sharded_files untested_versions hub hub_content renamed_code \
	code_update publishing finetuning_runs quantized_files,$(or $(wildcard tests/*/test_$(name).py),$(error no tests/*/test_$(name).py)))
# With the newest transformers but one, what has broken with a new one: generation, caches, loading, saving, Trainer.
OF_PREVIOUS = $(foreach name,canaries canaries_of_others generation golden modeling checkpoints registration configuration \
	mtp mtp_generation trainer copies sharded_files untested_versions,$(or $(wildcard tests/*/test_$(name).py),$(error no tests/*/test_$(name).py)))
OF_TORCH = $(foreach name,experts experts_triton routing_triton,tests/core/test_$(name).py)
# Nor quantised caches and flex attention, which compile themselves for a minute when they are first used, nor what takes
# long and is of publishing or of several processes alone.
NOT_OF_VERSIONS = not exact_distribution and not compiled and not quantised and not flex_attention and not every_snippet \
	and not token_is_nowhere and not by_its_code_alone and not two_processes and not (ordinary_greedy and alone)

.PHONY: help demo test test-slow test-gpu test-oldest test-oldest-torch test-previous test-newest environments lint kernels format benchmark docs notebook \
	clean

help:
	@echo "make demo [ARGS=--quick]  upcycle, fine-tune, save, reload and use a real model"
	@echo "make test                 lint, types, kernels and the tests, with coverage"
	@echo "make test-slow            tests that take minutes or several processes"
	@echo "make test-gpu             tests that need a GPU"
	@echo "make test-oldest          what versions have a part in, with the oldest supported transformers and peft"
	@echo "make test-previous        fewer of them with the newest transformers but one"
	@echo "make test-newest          the same with whatever pip finds today: an environment that is made anew"
	@echo "make lint | format        ruff and mypy | ruff's formatter"
	@echo "make kernels [KERNELS=--save]  compile the kernels for four GPUs, without one, if they have changed"
	@echo "make benchmark            compare with transformers and PEFT, and measure the rest (more than an hour)"
	@echo "make notebook             run examples/quickstart.ipynb on the demo's model"
	@echo "make docs                 build the documentation site into site/, with every link checked"

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py $(ARGS)

# Coverage makes Triton's interpreter three times as slow: what runs in it most comes apart, and is not measured. ARGS may
# choose no test of a part (5).
INTERPRETED = tests/core/test_experts_triton.py tests/core/test_routing_triton.py tests/quantization/test_quantized_triton.py
test: lint kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-fail-under=95 $(INTERPRETED:%=--ignore=%) $(ARGS) || test $$? = 5
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(INTERPRETED) $(ARGS) || test $$? = 5

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

# In the environment that is there (torch, triton, transformers, peft, pytest, hypothesis), which needs no network and
# not even an installed package. The generated cases, for which hundreds of kernels are compiled, come apart and last.
# A part that takes longer than GPU_LIMIT is stopped, and has failed.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
GPU_LIMIT ?= 300
AT_MOST = $(if $(shell command -v timeout),timeout $(GPU_LIMIT))
test-gpu:
	$(AT_MOST) $(GPU_PYTHON) -m pytest -m "gpu and not generated" tests/core/test_gpu.py $(ARGS); first=$$?; \
	$(AT_MOST) $(GPU_PYTHON) -m pytest -m "gpu and generated" tests/core/test_gpu.py $(ARGS); second=$$?; \
	test $$first = 0 -o $$first = 5 && test $$second = 0 -o $$second = 5  # 5: ARGS has chosen none of a part

test-oldest test-previous: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(IN_PARALLEL) -k "$(NOT_OF_VERSIONS)" $(TESTS) $(ARGS)

test-oldest: TESTS = $(OF_VERSIONS)
test-previous: TESTS = $(OF_PREVIOUS)

# The oldest torch: what Dynamo traces, and the kernels with its Triton.
test-oldest: test-oldest-torch
test-oldest-torch: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(IN_PARALLEL) -k "compiled or several or many_choices" $(OF_TORCH) $(ARGS)

# Nothing is held back but torch, whose newest builds are gigabytes. Not part of CI: what pip finds changes every day.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/torch.txt
	.venv-newest/$(PIP_INSTALL) --constraint .venv-newest/torch.txt torch
	.venv-newest/$(PIP_INSTALL) --constraint .venv-newest/torch.txt --editable '.[dev]'
	.venv-newest/bin/python -m pip list --disable-pip-version-check | \
		grep -iE '^(torch|triton|transformers|tokenizers|peft|accelerate|safetensors|huggingface.hub|trl|datasets) '
	.venv-newest/bin/python -m pytest --noconftest tests/core/test_canaries*.py  # they run where the package cannot be imported
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(IN_PARALLEL) -k "$(NOT_OF_VERSIONS)" $(OF_VERSIONS) $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks:examples $(BIN)/mypy benchmarks  # apart: it has a module `conversion` too

# Every kernel for every target, with its registers; fails where one spills. Not again if nothing has changed: after a
# change, `make kernels KERNELS=--save` notes what was compiled.
KERNELS ?= --unless-saved
kernels: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/compile_kernels.py $(KERNELS)

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

# On the model that `make demo` leaves; what it draws and prints goes to runs/notebook.
notebook: $(VENV)/.docs
	test -d runs/demo/model || $(MAKE) demo ARGS=--quick
	mkdir -p runs/notebook
	cd examples && $(abspath $(BIN))/jupyter execute quickstart.ipynb --output ../runs/notebook/quickstart.ipynb

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

$(VENV)/.docs: $(VENV)/.installed
	$(VENV)/$(PIP_INSTALL) --constraint constraints.txt --editable '.[docs]'
	touch $@

# torch comes first and alone, so that the constraint decides its version before anything else asks for one. Which
# build pip takes, for a GPU or for the CPU, is for pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL).
# Python compiles a module when it is first imported, most of them never: pip does not do it for all.
PIP_INSTALL = bin/python -m pip install --quiet --no-compile --disable-pip-version-check

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(PIP_INSTALL) --constraint constraints.txt torch
	touch $@

# What the package and its extras ask for comes first, so that two environments can be filled at a time: what builds the
# package itself writes into this folder.
LIST_REQUIREMENTS = import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = [one for name in sys.argv[1:] for one in project["optional-dependencies"][name]]; \
	print(*project["dependencies"], *extras, sep="\n")

$(VENV)/.requirements: $(VENV)/.torch pyproject.toml
	$(BIN)/python -c '$(LIST_REQUIREMENTS)' dev demo quant > $@.txt
	$(VENV)/$(PIP_INSTALL) --constraint constraints.txt --requirement $@.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements
	$(VENV)/$(PIP_INSTALL) --no-deps --editable .
	touch $@

.venv-oldest/.torch .venv-previous/.torch: .venv-%/.torch: constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/$(PIP_INSTALL) --constraint constraints-$*.txt torch
	touch $@

.venv-oldest/.requirements .venv-previous/.requirements: .venv-%/.requirements: .venv-%/.torch pyproject.toml
	.venv-$*/bin/python -c '$(LIST_REQUIREMENTS)' dev > $@.txt
	.venv-$*/$(PIP_INSTALL) --constraint constraints-$*.txt --requirement $@.txt
	touch $@

.venv-oldest/.installed .venv-previous/.installed: .venv-%/.installed: .venv-%/.requirements
	.venv-$*/$(PIP_INSTALL) --no-deps --editable .
	touch $@

# For CI: the longest part of three installations, which keeps one core busy, two at a time.
environments:
	$(MAKE) --jobs $(JOBS) $(VENV)/.requirements .venv-oldest/.requirements .venv-previous/.requirements
	$(MAKE) --jobs 1 $(VENV)/.installed .venv-oldest/.installed .venv-previous/.installed

clean:
	rm -rf .venv .venv-oldest .venv-previous .venv-newest build dist runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
