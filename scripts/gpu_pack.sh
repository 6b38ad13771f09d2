#!/bin/sh
# gpu_pack.sh [OBJECTS] [OUT]: builds the programs and the tests of the CUDA backend, linked statically and stripped,
# and packs what a GPU machine needs to run gpu_check.sh and gpu_bench.sh into OUT/strata-gpu.tar.xz: the sources go
# beside it, libraries beyond glibc's and CUDA's do not. OBJECTS (build-static) keeps the build for the next time.
set -eu

source=$(cd "$(dirname "$0")/.." && pwd)
objects=${1:-$source/build-static}
out=${2:-$source/build-gpu}
tests="matmul_test matmul_classes_test project_test rows_test embed_test engine_test executor_test executor_ahead_test"
tests="$tests executor_stages_test executor_measure_test stamp_test weight_cache_test memory_plan_test file_read_bench"

launcher="" # not for CUDA: ccache does not see a change inside an #if on the GPU's architecture
! command -v ccache > /dev/null || launcher="-DCMAKE_C_COMPILER_LAUNCHER=ccache"
# shellcheck disable=SC2086 # several words
cmake -S "$source" -B "$objects" -G Ninja -DSTRATA_CUDA=ON -DSTRATA_STATIC=ON $launcher ${CMAKE_FLAGS:-} \
    > "$objects.log" 2>&1 || { cat "$objects.log" >&2; exit 1; }
mv "$objects.log" "$objects/configure.log"
for file in "$source"/tests/*/cuda_*_test.c "$source"/tests/bench/cuda_*_bench.c; do
    [ ! -f "$file" ] || tests="$tests $(basename "$file" .c)"
done
# shellcheck disable=SC2086
ninja -C "$objects" strata strata-worker strata-coordinator $tests

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir -p "$stage/tests" "$out"
for program in strata strata-worker strata-coordinator; do
    strip -o "$stage/$program" "$objects/$program"
done
for test in $tests; do
    strip -o "$stage/tests/$test" "$objects/tests/$test"
done
cp "$objects"/*.py "$stage/"
"$source/tests/tools/make_stubs" "$stage/stubs"
there='^(linux-vdso|/lib.*ld-linux|lib(c|m|rt|dl|pthread|gcc_s|stdc\+\+|cublas|cublasLt|cudart|nccl)\.so)'
foreign=$(for file in "$stage"/strata* "$stage"/tests/*; do ldd "$file"; done | awk '{print $1}' | sort -u |
    grep -Ev "$there" || true)
[ -z "$foreign" ] || { echo "gpu_pack.sh: these libraries would be missing elsewhere: $foreign" >&2; exit 1; }
# Every program holds the same kernels: a dictionary that reaches back over several stores them once.
tar -C "$stage" -c . | xz -T1 --lzma2=preset=3,dict=192MiB > "$out/strata-gpu.tar.xz"
rm -rf "$out/unpacked"
du -sh "$stage" "$out/strata-gpu.tar.xz" | awk '{print $1, NR == 1 ? "unpacked" : "packed"}'
