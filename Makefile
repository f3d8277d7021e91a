# make quickstart   installs everything and trains on handwritten digits
# make test         installs everything and runs the tests
# make test-slow    the long tests
# make story       tokenizer, pre-training, fine-tuning on digits beside training from scratch
# make coverage lint format lock bench bench-gpu
#
# CPU=1 installs without CUDA, CUDA=cuda13 with CUDA 13; the default looks for an NVIDIA GPU.
# PEERS=1 also installs what tests otherwise skip: torch and PEFT, which parity tests and benchmarks
# compare with, beside a GPU timm, and HuggingFace's datasets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CUDA ?= cuda12
GPU := $(if $(CPU),,$(shell command -v nvidia-smi))
# huge pages, and memory that is not given back between steps
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
PEER_NAMES := torch peft datasets $(if $(GPU),timm torchvision)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)

.PHONY: setup quickstart test test-slow coverage lint format lock bench bench-gpu story

quickstart: setup
	$(BIN)/python main.py --config=configs/quickstart.py --workdir=workdirs/quickstart

test: setup
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --durations=10 -o faulthandler_timeout=1200

test-slow: setup
	$(BIN)/python -m pytest -q -m slow --durations=10

coverage: setup
	$(BIN)/python -m pytest -q --cov=beit_jax --cov-report=term

bench: setup
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/python -m benchmarks
	GLIBC_TUNABLES=$(MALLOC) $(BIN)/python -m benchmarks.parts
	$(BIN)/python -m benchmarks.inputs
	$(BIN)/python -m benchmarks.startup

bench-gpu: setup
	$(BIN)/python -m benchmarks --device gpu --rounds 2 --seconds 1 --resume
	$(BIN)/python -m benchmarks.parts --device gpu --seconds 1
	$(BIN)/python -m benchmarks.parts --device gpu --seconds 1 --size "ViT-8M/4 @32" --batch 1024 \
		--options "attention xla" "attention cudnn" --out benchmarks/results/parts_gpu_small.json
	$(BIN)/python -m benchmarks.inputs --files 4096 --batches 64 --out benchmarks/results/inputs_gpu.json
	$(BIN)/python -m benchmarks.startup --rounds 1 --out benchmarks/results/startup_gpu.json --config.preset=base \
		--config.model.image_size=224 --config.model.patch_size=16
	$(if $(DATA_DIR),$(BIN)/python -m benchmarks.epoch --device gpu --data_dir $(DATA_DIR))

story: setup
	$(BIN)/python -m benchmarks.story

setup: $(VENV)/.done
	$(if $(PEERS),$(BIN)/python -c "$(foreach name,$(PEER_NAMES),import $(name);)" 2>/dev/null || $(BIN)/python -m pip install -q $(PEER_NAMES:torch=torch==2.13.0))

$(VENV)/.done: requirements.txt requirements-cpu.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; use make PYTHON=python3.12')"
	@echo "Installing into $(VENV), which takes a minute or so"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	sed 's/cuda12/$(CUDA)/' $(REQUIREMENTS) > .requirements.txt
	$(BIN)/python -m pip install -q -r .requirements.txt pytest pytest-cov pytest-xdist
	$(BIN)/python -m pip install -qq --no-deps -e .
	touch $@

lint:
	$(BIN)/python -m pip install -q ruff && $(BIN)/ruff check . && $(BIN)/ruff format --check .

format:
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lock:
	uv pip compile -q --universal --python-version 3.11 requirements.txt -o requirements.lock
	uv pip compile -q --universal --python-version 3.11 requirements-cpu.txt -o requirements-cpu.lock
