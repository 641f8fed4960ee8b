# Every target sets up .venv as needed and may be run again. Requires Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
SEED ?= 0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/common/*.cpp csrc/common/*.h)
TOOLS_CPP := $(wildcard tools/emulator/*.cpp tools/emulator/*.cu tools/emulator/*.h tools/kernel_times/*.cu \
  tools/new_op/templates/*.cpp \
  tools/new_op/templates/*.cu tools/new_op/templates/*.h examples/cpp/*.cpp)

.PHONY: help venv test demo op lint format bench wheel check-abi check-wheel clean

help:
	@echo "For everyone"
	@echo "  make test             run the tests (ARGS='-k nms' selects some)"
	@echo "  make lint             check style and types; 'make format' rewrites files"
	@echo "  make bench            run the benchmarks"
	@echo "  make demo SEED=0      train on photographs of trees, evaluate, and draw the detections"
	@echo "  make docs             build the docs site into build/docs"
	@echo "For authors of ops"
	@echo "  make op NAME=foo      create a new op from templates; it builds and passes its tests"
	@echo "  make emulated         run the tests of the CUDA kernels on the CPU"
	@echo "  make emulated-asan    the same, looking for memory errors"
	@echo "  make emulated-races   the same, looking for races and counting bytes"
	@echo "  make kernel-coverage  run emulated-asan, and list the lines of the kernels that no test runs"
	@echo "  make kernel-times     predict the times of the ops on GPUs (ARGS='nms --lines': where the time of nms goes)"
	@echo "  make fuzz             run the property tests with 20,000 new cases each"
	@echo "  make test-instruction-sets  run the tests of the ops with each older instruction set of the CPU"
	@echo "For maintainers"
	@echo "  make gpu-check        on a machine with a GPU: build, tests, sanitizers, calibration, benchmarks in 8 minutes"
	@echo "  make mutants          mutate the kernels and record which test notices each mutant; takes hours"
	@echo "  make pages            rewrite docs/generated/ops.md, gallery.md and nms_conformance.md"
	@echo "  make accuracy         measure the accuracy of the focal loss and rewrite docs/generated/accuracy.md"
	@echo "  make kernel-resources rewrite docs/generated/kernels.md; 'make check-kernels' compares a build with it"
	@echo "  make wheel            build sdist and wheel into dist/"
	@echo "  make check-abi        fail on symbols or headers outside torch's stable ABI"
	@echo "  make check-wheel      run the tests of the ops with the wheel beside older versions of torch"
	@echo "  make clean            delete everything that was built, .venv included"

venv: $(VENV)/.installed

# torch and the CUDA compiler are resolved together, so that both have the same CUDA version.
$(VENV)/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10; choose another with make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "no C++ compiler found; install g++ or clang, or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check \
	  "torch>=2.10" torchvision "setuptools>=77" ninja \
	  "cuda-toolkit[nvcc,cccl]; sys_platform == 'linux' and platform_machine == 'x86_64'"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py $(CPP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check \
	  --no-build-isolation -e ".[model,video,dev,docs]"
	@touch $@

test: venv
	$(BIN)/python -m pytest $(ARGS)

# `make test` uses the newest instruction set of the machine. These are the older ones.
.PHONY: test-instruction-sets accuracy
test-instruction-sets: venv
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest tests/ops $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest tests/ops $(ARGS)

accuracy: venv
	$(BIN)/python -m tools.pages.focal_accuracy $(ARGS)

# Tests the CUDA kernels without a GPU; see CONTRIBUTING.md. Each variant runs the threads in an order of its own, and
# SCHEDULES='random:7' chooses another one.
.PHONY: emulated emulated-asan emulated-races kernel-coverage
emulated: SCHEDULES ?= fifo
emulated-asan: SCHEDULES ?= lifo
emulated-races: SCHEDULES ?= random:2
emulated emulated-asan emulated-races: venv
	$(BIN)/python -m tools.emulator.run $(or $(patsubst emulated-%,%,$(filter-out emulated,$@)),plain) $(SCHEDULES) -- $(ARGS)

# Predicts the times of the ops on GPUs, and rewrites docs/generated/kernel_times.*. ARGS=--check compares instead.
.PHONY: kernel-times
kernel-times: venv
	$(BIN)/python -m tools.kernel_times $(ARGS)

# Runs the property tests with FUZZ_EXAMPLES new cases each, on the CPU kernels and, in three schedules, on the emulated
# CUDA kernels.
.PHONY: fuzz
fuzz: export FUZZ_EXAMPLES ?= 20000
fuzz: venv
	$(BIN)/python -m pytest tests/ops/test_*_properties.py $(ARGS)
	$(BIN)/python -m tools.emulator.run plain fifo lifo random:1 -- tests/ops/test_*_properties.py $(ARGS)

kernel-coverage: venv
	$(BIN)/python -m tools.emulator.line_coverage $(ARGS)

# Needs Python only. Formats the files if .venv has the formatters.
op:
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PYTHON) -m tools.new_op $(NAME)

# The pages that need neither a GPU nor a long run.
.PHONY: pages
pages: venv
	$(BIN)/python -m tools.pages.ops
	$(BIN)/python -m tools.pages.gallery
	$(BIN)/python -m tools.pages.nms_conformance

# Warnings, such as those about links that lead nowhere, are errors.
.PHONY: docs
docs: venv
	$(BIN)/python -m sphinx -W --keep-going --quiet docs build/docs $(ARGS)
	@echo "open build/docs/index.html"

demo: venv
	$(BIN)/python -m retinanet.demo --seed $(SEED)

bench: venv
	$(BIN)/python -m pytest benchmarks $(ARGS)

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(TOOLS_CPP)
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP) $(TOOLS_CPP)

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

# Uses PYTHON, which needs torch, instead of .venv, because a GPU machine may have no network.
gpu-check:
	$(PYTHON) -m tools.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info retinanet_ops/*.so retinanet_ops/_build_info.json
