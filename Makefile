# Every target sets up what it needs in .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
# The CPU build by its full name: where it cannot be had the installation fails, instead of pulling gigabytes of CUDA.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
SOURCES := hydradeploy tests benchmarks cli.py

# The oldest device: Python 3.10 with the last ONNX Runtime made for it. Tests that need it skip where it is not here.
DEVICE_PYTHON ?= $(firstword $(foreach python,python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10*/bin/python),\
	$(if $(shell $(python) -c 'import sys; print(sys.version_info[:2] == (3, 10) or "")' 2>/dev/null),$(python))))

.PHONY: setup demo check format test test-gpu test-slow test-arm64 bench docs clean

setup: .venv/ready $(if $(DEVICE_PYTHON),.venv-device/ready)

.venv/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)" 2>/dev/null || $(BIN)/pip install -q --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/pip install -q -e ".[dev]" "$(TORCH)"
	$(BIN)/python -m compileall -q hydradeploy
	touch $@

.venv-device/ready: pyproject.toml Makefile
	$(DEVICE_PYTHON) -m venv .venv-device
	.venv-device/bin/pip install -q "onnxruntime==1.23.2" msgspec numpy Pillow psutil rich "typer>=0.27,<0.29"
	touch $@

# PyPI's torch, which is for CUDA, and the ONNX Runtime for GPUs in the place of the one for processors, whose module it
# shares: of both the one installed last is there.
.venv-gpu/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install -q -e ".[train]" hypothesis pytest
	.venv-gpu/bin/pip uninstall -q -y onnxruntime
	.venv-gpu/bin/pip install -q -e ".[cuda,tensorrt-rtx]"
	touch $@

demo: .venv/ready
	$(BIN)/hydradeploy demo --force

check: .venv/ready
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

test: setup
	$(BIN)/pytest -n 2 --dist worksteal

test-gpu: .venv-gpu/ready
	HYDRADEPLOY_REQUIRE=gpu .venv-gpu/bin/pytest -m gpu tests/gpu tests/backends

test-slow: setup
	$(BIN)/pytest -m slow -n 2 --dist loadfile

# Once: apt-get install debootstrap qemu-user-static. The system it makes stays in build/arm64.
test-arm64: .venv/ready
	nice $(BIN)/pytest -m arm64 tests/arm64

bench: setup
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/shared_weights.py
	$(BIN)/python benchmarks/pick.py
	$(BIN)/python benchmarks/training.py

docs: .venv/ready
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .venv-device .venv-gpu build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
