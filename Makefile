# Everything runs in a virtual environment of its own, .venv, made on first use. Variables you may set:
#   TORCH        the torch to install, as pip spells it
#   TORCH_INDEX  where else to look for it; the default serves builds without the several GB of CUDA packages
#   PYTHON       the interpreter the environment is made with (3.10 or later)
#   PYTEST_ARGS  e.g. PYTEST_ARGS="-n 0 -k radam"
#   CASES, SEED  how many random programs, and which
#   BASE         the commit to race against
#   TABLE        where `make contract` writes, if not to docs/contract.md
#   FASTOPT_COMMIT  what benchmark records call this tree, where it is a copy without its history
#   FASTOPT_CUDA, FASTOPT_CUDA_ARCHS, FASTOPT_CUDA_MIXES, CUDA_HOME, CXX, MAX_JOBS
#                what is built, and with what: see setup.py. By default kernels for the GPUs present, none if there is
#                none; for the tests kernels for sm_90 wherever there is nvcc, and the emulator of a device

TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON ?= python3
PYTEST_ARGS ?= -n 2
SEED ?= 1
BASE ?= HEAD~1
TABLE ?= docs/contract.md
fuzz: CASES ?= 10000
sanitize: CASES ?= 1000

# Some tests take a minute, and most of them stand together: whoever is done takes over from whoever is not.
PYTEST := -m pytest -q --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.stamp
HAVE_TORCH := $(STAMP)-$(subst =,-,$(TORCH))
BUILT := $(STAMP)-extension
BUILT_FOR_TESTS := $(BUILT)-for-tests
BUILT_AOT := $(BUILT)-aot
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

export FASTOPT_EXT := 1

# Each build takes the objects of the others that are the same; only what differs is compiled, and the library linked.
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
test contract $(BUILT_FOR_TESTS) aot $(BUILT_AOT): export FASTOPT_EMULATOR := 1
test contract $(BUILT_FOR_TESTS): export FASTOPT_CUDA ?= $(if $(NVCC),1,0)
test contract $(BUILT_FOR_TESTS): export FASTOPT_CUDA_ARCHS ?= 90
test contract $(BUILT_FOR_TESTS): export FASTOPT_CUDA_MIXES ?= f32;bf16_f32;bf16
aot $(BUILT_AOT): export FASTOPT_AOT := 1
aot $(BUILT_AOT): export FASTOPT_CUDA := 1
aot $(BUILT_AOT): export FASTOPT_CUDA_ARCHS := 80;90;100+PTX
sanitize: export FASTOPT_SANITIZE := address,undefined
sanitize: export FASTOPT_EMULATOR := 1
sanitize: export FASTOPT_CUDA := 0

.PHONY: help smoke demo test contract fuzz sanitize aot gpu check lint docs bench build wheel clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BUILT) $(STAMP)-demo ## train real models with torch.optim and with fastopt, side by side
	@$(BIN)/python -m fastopt demo

test: $(BUILT_FOR_TESTS) $(STAMP)-test ## all tests; with nvcc, of the CUDA kernels' code too (no GPU needed)
	@$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# With "=", or pytest takes the table for a file of tests before tests/conftest.py has told it of the option.
contract: $(BUILT_FOR_TESTS) $(STAMP)-test ## the tests of what torch.optim promises; what passed, as a table in TABLE
	@$(BIN)/python $(PYTEST) -m contract "--contract-table=$(TABLE)" $(PYTEST_ARGS)

fuzz: $(BUILT_FOR_TESTS) $(STAMP)-test ## CASES random programs, each compared with torch.optim after every step
	@PYTHONPATH=tests $(BIN)/python -m fuzz --cases $(CASES) --seed $(SEED)
	@PYTHONPATH=tests $(BIN)/python -m fuzz --cases $$(($(CASES) / 10)) --seed $(SEED) --triton

# A package of its own, so that no other build is touched, with the widest vectors that this machine has and with none.
# Leaks are left out: Python and torch keep what they make until the process ends. tests/test_memory.py looks for growth.
sanitize: $(STAMP)-test ## CASES random programs with AddressSanitizer and UBSan in the C++, device kernels included
	@$(BIN)/python setup.py --quiet build --build-lib build/sanitized
	@cd tests && for isa in "" baseline; do \
		FASTOPT_ISA=$$isa PYTHONPATH=../build/sanitized:. \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
		../$(BIN)/python -m fuzz --sanitized --cases $(CASES) --seed $(SEED) || exit 1; done

aot: $(BUILT_AOT) $(STAMP)-test ## compile and check the GPU kernels for every architecture and dtype (needs nvcc)
	@$(BIN)/python $(PYTEST) $(PYTEST_ARGS) tests/test_cuda_compiled.py tests/test_cuda_interpreted.py \
		tests/test_triton_compiled.py

# No environment is made and nothing is fetched: such a machine has its own torch, Triton, nvcc, ninja and pytest.
gpu: ## on a machine with a GPU: build, test and measure there, within nine minutes, into the folder OUT
	@test -n "$(OUT)" || { echo "make gpu OUT=folder: where shall the results go?"; exit 2; }
	@$(PYTHON) -m bench.gpu_run "$(OUT)"

check: lint test ## what continuous integration runs: style, types, tests

lint: $(STAMP)-dev ## style and types only
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --quiet --check . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --strict fastopt
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# Not quietly: mkdocs would drop warnings before its configuration makes errors of them.
docs: $(STAMP)-docs ## the documentation as a site in build/site; whatever mkdocs warns of is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(BUILT) $(STAMP)-test $(STAMP)-peers ## the speed tables on this machine's CPU
	@$(BIN)/python -m bench cpu

# Two minutes. It says what is slower and fails for nothing but an error: a time is for a person to judge.
smoke: $(STAMP)-test ## race the kernels against those of the commit BASE
	@git rev-parse --quiet --verify "$(BASE)^{commit}" >/dev/null 2>&1 || { echo "no commit $(BASE) here: no comparison"; exit 0; } \
		&& $(BIN)/python -m bench compare --quick --report-only $(BASE)

build: $(BUILT) $(STAMP)-dev ## environment for development, extension compiled in place

wheel: $(HAVE_TORCH) ## a wheel for this Python and this torch, in dist/
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## remove what was built (not the environment)
	@rm -rf build dist *.egg-info fastopt/_C.*.so $(BUILT)*

# What a build needs. torch alone is looked up at the second index, without its dependencies: should that index be out of
# reach, it costs a second and a warning.
$(HAVE_TORCH):
	@echo "environment: $(TORCH) into $(VENV) (a large download)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "setuptools>=77" "ninja>=1.11"
	@$(PIP) install --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	@touch $@

# Through setuptools rather than pip: what the compiler does is seen, and a build without changes takes half a second.
$(BUILT) $(BUILT_FOR_TESTS) $(BUILT_AOT): $(HAVE_TORCH) setup.py $(CXX_SOURCES)
	@echo "extension: compiling what has changed"
	@rm -f $(BUILT)*
	@touch $@.begun  # what is edited meanwhile is newer
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@mv $@.begun $@

# One by one, without dependencies: some would bring another torch, and none has to be there.
$(STAMP)-peers: bench/peers.txt $(STAMP)-test
	@echo "environment: other people's optimizers, to race against"
	@grep -v '^#' $< | xargs -n 1 $(PIP) install --no-deps || echo "some are not to be had; the tables do without them"
	@touch $@

# torch is named again so that no dependency can replace it by another build. The extension is left to the rule above.
$(STAMP)-%: $(HAVE_TORCH) pyproject.toml
	@echo "environment: fastopt[$*]"
	@FASTOPT_EXT=0 $(PIP) install --no-build-isolation "$(TORCH)" --editable ".[$*]"
	@touch $@
