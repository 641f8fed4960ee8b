# Every target sets up what it needs in .venv and may be run again. Needed: Python >= 3.10, a C++ compiler, make.
PYTHON ?= python3
SEED ?= 0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/common/*.cpp csrc/common/*.h)
EMULATION := $(wildcard tools/emulator/*.cpp tools/emulator/*.cu tools/emulator/*.h)

.PHONY: help venv test demo lint format bench wheel check-abi check-wheel clean

help:
	@echo "make test          run the test-suite (ARGS='-k nms' for a part)"
	@echo "make emulated      run the CUDA kernels' tests on the CPU; -asan: memory errors, -races: races and bytes moved"
	@echo "make kernel-coverage  which lines of the kernels those tests run"
	@echo "make test-instruction-sets  the tests of the ops, once for each older instruction set of the CPU"
	@echo "make fuzz          the property tests of the ops with 20,000 new cases each, on the CPU and the emulated kernels"
	@echo "make accuracy      measure the focal loss against others' and rewrite docs/generated/accuracy.md"
	@echo "make demo SEED=0   train on tree-crown photographs, evaluate, draw the detections"
	@echo "make bench         run the benchmarks"
	@echo "make lint          check style and types; 'make format' rewrites"
	@echo "make wheel         build sdist and wheel into dist/"
	@echo "make check-abi     no symbol or header outside torch's stable ABI"
	@echo "make check-wheel   the wheel passes the tests of the ops beside other versions of torch"
	@echo "make check-kernels no kernel spills or loses its 128-bit accesses; 'make kernel-resources' rewrites the table"
	@echo "make mutants       change the kernels, one small mutation at a time: which test stage notices; takes an hour"
	@echo "make gpu-check     on a machine with a GPU: build, tests, sanitizers and benchmarks within 10 minutes"
	@echo "make clean         delete all that was built, .venv too"

venv: $(VENV)/.installed

# One resolution for torch and the CUDA compiler, so that the compiler is of torch's CUDA version.
$(VENV)/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "retinanet-ops needs Python >= 3.10; name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "no C++ compiler: install g++ or clang, or name one with CXX=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check \
	  "torch>=2.10" torchvision "setuptools>=77" ninja \
	  "cuda-toolkit[nvcc,cccl]; sys_platform == 'linux' and platform_machine == 'x86_64'"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py $(CPP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check \
	  --no-build-isolation -e ".[model,dev]"
	@touch $@

test: venv
	$(BIN)/python -m pytest $(ARGS)

# The tests of the ops with the instruction sets that this machine would not choose.
.PHONY: test-instruction-sets accuracy
test-instruction-sets: venv
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest tests/ops $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest tests/ops $(ARGS)

accuracy: venv
	$(BIN)/python -m tools.pages.focal_accuracy $(ARGS)

# The CUDA kernels without a GPU: see CONTRIBUTING.md.  SCHEDULES='random:7' for another order of threads.
.PHONY: emulated emulated-asan emulated-races kernel-coverage
emulated: SCHEDULES ?= fifo lifo random:1 random:2
emulated-asan emulated-races: SCHEDULES ?= random:1
emulated emulated-asan emulated-races: venv
	$(BIN)/python -m tools.emulator.run $(or $(patsubst emulated-%,%,$(filter-out emulated,$@)),plain) $(SCHEDULES) -- $(ARGS)

# The property tests with FUZZ_EXAMPLES new cases each.
.PHONY: fuzz
fuzz: export FUZZ_EXAMPLES ?= 20000
fuzz: venv
	$(BIN)/python -m pytest tests/ops/test_*_properties.py $(ARGS)
	$(BIN)/python -m tools.emulator.run plain fifo -- tests/ops/test_*_properties.py $(ARGS)

kernel-coverage: venv
	$(BIN)/python -m tools.emulator.line_coverage $(ARGS)

demo: venv
	$(BIN)/python -m retinanet.demo --seed $(SEED)

bench: venv
	$(BIN)/python -m pytest benchmarks $(ARGS)

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(EMULATION)
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP) $(EMULATION)

wheel: venv
	$(BIN)/python -m build --no-isolation

check-abi: venv
	tools/check_abi.sh retinanet_ops/*.so

check-wheel: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/check_wheel.sh

.PHONY: check-kernels kernel-resources
check-kernels: venv
	$(BIN)/python -m tools.pages.kernel_resources --check

kernel-resources: venv
	$(BIN)/python -m tools.pages.kernel_resources

.PHONY: mutants gpu-check
mutants: venv
	$(BIN)/python -m tools.mutants $(ARGS)

# With the python that has torch: PYTHON=..., without .venv and without network.
gpu-check:
	$(PYTHON) -m tools.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info retinanet_ops/*.so retinanet_ops/_build_info.json
