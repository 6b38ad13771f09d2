# The front doors, thin over CMake. On a fresh Debian 12 each installs what it needs.
#
#   make demo    build, fetch a small model, serve it with two workers, ask it something   (MODEL=x.gguf for your own)
#   make check   build, run every test
#   make         build only
#
# Also: check-asan, check-tsan (the whole suite under sanitizers), check-emulated (the CUDA kernels on this processor),
# fuzz (FUZZ_SECONDS a target), bench (MODEL), format, clean. With a GPU: gpu-check (PARTS=ops engine general e2e
# sanitizer), gpu-bench (OPTIONS for gpu_bench.py); with two, gpu-pair (OPTIONS for gpu_pair.py). Without one, for
# another machine: gpu-build packs build-gpu/, which gpu_check.sh, gpu_bench.sh and gpu_pair.sh in scripts/ run there.

BUILD ?= build
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 60
CMAKE_FLAGS ?=
export CTEST_OUTPUT_ON_FAILURE = 1

.PHONY: all deps configure build programs demo check check-asan check-tsan check-emulated fuzz bench format clean \
        gpu-check gpu-bench gpu-pair gpu-build

all: build

deps:
	@scripts/install_dependencies.sh

configure: deps
	@cmake -S . -B $(BUILD) -G Ninja $(CMAKE_FLAGS) > $(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@mv $(BUILD).log $(BUILD)/configure.log

build: configure
	@ninja -C $(BUILD) -j$(JOBS)

programs: configure
	@ninja -C $(BUILD) -j$(JOBS) strata strata-coordinator strata-worker

demo: programs
	@scripts/demo.sh $(BUILD) "$(MODEL)"

check: build
	@ctest --test-dir $(BUILD) -j$(JOBS)

# $(call sanitized,NAME,SANITIZERS): the whole suite in a build of its own, without CUDA: NVIDIA's libraries are not
# instrumented, and kernels have a sanitizer of their own (gpu-check).
define sanitized
	@scripts/install_dependencies.sh
	@cmake -S . -B $(BUILD)-$(1) -G Ninja -DSTRATA_CUDA=OFF -DSTRATA_SANITIZE=$(2) $(CMAKE_FLAGS) > /dev/null
	@ninja -C $(BUILD)-$(1) -j$(JOBS)
	@ctest --test-dir $(BUILD)-$(1) -j$(JOBS) -E '^tidy/'
endef

check-asan:
	$(call sanitized,asan,address$(comma)undefined)

check-tsan:
	$(call sanitized,tsan,thread)

comma := ,

# The suites that run on a GPU, with every kernel compiled for this processor (tests/emulator). Not those of a GPU's
# faults and of NCCL.
EMULATED_SUITES = ops/(matmul|project|rows|embed|stamp|engine|cuda_)|general/|unit/(executor|weight_cache|memory_plan)

check-emulated:
	@scripts/install_dependencies.sh
	@cmake -S . -B $(BUILD)-emulated -G Ninja -DSTRATA_CUDA=EMULATED $(CMAKE_FLAGS) > /dev/null
	@ninja -C $(BUILD)-emulated -j$(JOBS)
	@ctest --test-dir $(BUILD)-emulated -j$(JOBS) -R '$(EMULATED_SUITES)' -E cuda_fault

fuzz:
	@scripts/install_dependencies.sh
	@scripts/fuzz.sh $(BUILD)-fuzz $(FUZZ_SECONDS)

bench: build
	@scripts/bench.sh $(BUILD) $(MODEL)

gpu-check: CMAKE_FLAGS += -DSTRATA_CUDA=ON
gpu-check: build
	@scripts/gpu_check.sh $(BUILD) $(PARTS)

gpu-bench: CMAKE_FLAGS += -DSTRATA_CUDA=ON
gpu-bench: programs
	@scripts/gpu_bench.sh $(BUILD) $(OPTIONS)

gpu-pair: CMAKE_FLAGS += -DSTRATA_CUDA=ON
gpu-pair: programs
	@scripts/gpu_pair.sh $(BUILD) $(OPTIONS)

gpu-build: deps
	@scripts/gpu_pack.sh

format:
	@git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp' | xargs clang-format -i

clean:
	@rm -rf $(BUILD) $(BUILD)-asan $(BUILD)-tsan $(BUILD)-fuzz $(BUILD)-emulated build-static build-gpu
