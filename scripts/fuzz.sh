#!/bin/sh
# fuzz.sh BUILD SECONDS: builds every libFuzzer target with clang, ASan and UBSan, and runs each that long. Inputs that
# were found interesting stay in BUILD/corpus.
set -eu

build=$1
seconds=$2
cmake -S . -B "$build" -G Ninja -DCMAKE_C_COMPILER=clang -DSTRATA_CUDA=OFF -DSTRATA_FUZZ=ON \
    -DSTRATA_SANITIZE=address,undefined > /dev/null
targets=$(cd tests/fuzz && ls ./*_fuzz.c | sed 's|^\./||; s|\.c$||')
# shellcheck disable=SC2086
ninja -C "$build" $targets
for target in $targets; do
    mkdir -p "$build/corpus/$target"
    seeds=tests/fuzz/corpus/${target%_fuzz}
    [ -d "$seeds" ] || seeds=""
    echo "$target: $seconds s"
    log=$build/$target.log
    # shellcheck disable=SC2086
    if ! UBSAN_OPTIONS=halt_on_error=1 "$build/tests/$target" -max_total_time="$seconds" -timeout=10 \
        -rss_limit_mb=4096 -artifact_prefix="$build/$target-" "$build/corpus/$target" $seeds > "$log" 2>&1; then
        tail -40 "$log"
        exit 1
    fi
    grep -E '^Done|DONE' "$log" | tail -1
done
