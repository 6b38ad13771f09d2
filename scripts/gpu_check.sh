#!/bin/sh
# gpu_check.sh [BUILD] [PART...]: the tests of the CUDA backend on this machine's GPU, as a table; the logs are kept.
# BUILD is a build folder, or build-gpu as gpu_pack.sh makes it elsewhere. Parts, all of them unless some are named:
#
#   ops         every op against f64, and the same bits in any company
#   engine      whole models against the oracle, executor and weight cache
#   general     both again with STRATA_CUDA_GENERAL=1: the path of GPUs other than 9.0
#   e2e         programs over gRPC: 1, 2 and 4 workers on one GPU
#   sanitizer   compute-sanitizer over a sample of the op tests: memcheck and racecheck
#
# Tests whose name contains $ONLY, when it is set. Ends with 0 when nothing failed and something was tested.
set -u

# shellcheck disable=SC1091
. "$(dirname "$0")/gpu_machine.sh"
parts=${*:-ops engine general e2e sanitizer}

# shellcheck disable=SC2154
logs=$build/gpu-check
mkdir -p "$logs"
# shellcheck disable=SC2154
export STRATA_TEST_BACKEND=cuda STRATA_TEST_BIN="$build" STRATA_TEST_SOURCE="$source" STRATA_TEST_PYTHON="$python"
[ ! -d "$build/stubs" ] || export STRATA_TEST_STUBS="$build/stubs"
[ -z "${GPU_CHECK_BACKEND:-}" ] || STRATA_TEST_BACKEND=$GPU_CHECK_BACKEND # to try this where there is no GPU
failures=0 tested=0

row() {
    printf '%-40s %7s %7s %8s %8s\n' "$@"
}

# How many passed and failed, from the last line of a suite: Check's, or that of the end-to-end tests.
counts() {
    sed -n -e 's/^[0-9]*%: Checks: \([0-9]*\), Failures: \([0-9]*\), Errors: \([0-9]*\).*/\1 \2 \3/p' \
        -e 's/^\([0-9]*\) tests, \([0-9]*\) failed$/\1 \2 0/p' "$1" |
        awk '{n += $1; bad += $2 + $3} END {if (NR) print n - bad, bad}'
}

# run NAME SECONDS COMMAND...: one line of the table.
run() {
    name=$1 limit=$2
    shift 2
    case $name in
    *"${ONLY:-}"*) ;;
    *) return ;;
    esac
    log=$logs/$(echo "$name" | tr ' /' '__').log
    began=$(date +%s)
    timeout -k 10 "$limit" "$@" > "$log" 2>&1
    code=$?
    seconds=$(($(date +%s) - began))
    found=$(counts "$log")
    passed=${found% *} failed=${found#* }
    if [ $code -eq 77 ]; then
        row "$name" 0 0 1 "$seconds"
        tail -n 1 "$log" | sed 's/^/    /'
        return
    fi
    if [ $code -ne 0 ] && [ "${failed:-0}" = 0 ]; then
        failed=1 # it ended otherwise: a crash, a time limit, a sanitizer's finding
    fi
    tested=$((tested + 1))
    row "$name" "${passed:-1}" "${failed:-0}" 0 "$seconds"
    if [ $code -ne 0 ]; then
        failures=$((failures + 1))
        if [ $code -eq 124 ] || [ $code -eq 137 ]; then
            echo "    no end within $limit s"
        fi
        grep -E ':[FE]:|^FAILED|Error:|ERROR SUMMARY|=========' "$log" | head -n 8 | cut -c 1-200 | sed 's/^/    /'
        echo "    $log"
    fi
}

op_tests() {
    for test in matmul_test matmul_classes_test project_test rows_test embed_test; do
        echo "$build/tests/$test"
    done
    ls "$build"/tests/cuda_*_test 2> /dev/null
}

check_ops() {
    for test in $(op_tests) "$build/tests/stamp_test"; do # which no sanitizer slows down: it looks at clocks
        run "ops/$(basename "$test")" 300 "$test"
    done
}

check_engine() {
    executor="executor_test executor_ahead_test executor_stages_test executor_measure_test"
    for test in engine_test $executor weight_cache_test memory_plan_test; do
        run "engine/$test" 400 "$build/tests/$test"
    done
}

check_general() {
    for test in $(op_tests | grep -v -e '/cuda_link[^/]*$' -e '/cuda_fault[^/]*$' -e '/cuda_general[^/]*$') \
        "$build/tests/engine_test" "$build/tests/executor_test"; do
        run "general/$(basename "$test")" 400 env STRATA_CUDA_GENERAL=1 "$test"
    done
}

# Several workers share one GPU here, and meet over NCCL all the same: a setting for tests only.
check_e2e() {
    export STRATA_OVERSUBSCRIBE=1 STRATA_PYTHON="$python"
    for test in generate_test oracle_test; do
        for workers in 1 2 4; do
            run "e2e/$test, $workers workers" 400 env STRATA_TEST_WORKERS=$workers \
                "$python" "$source/tests/e2e/$test.py"
        done
    done
    for test in invariance_test agreement_test chat_test pool_test soak_test; do
        run "e2e/$test" 600 "$python" "$source/tests/e2e/$test.py"
    done
    sed -n 's/.*prompts agree in all.*/    &/p' "$logs/e2e_agreement_test.log" 2> /dev/null
}

check_sanitizer() {
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
    if [ -z "$tool" ]; then
        row "sanitizer: no compute-sanitizer here" 0 0 1 0
        return
    fi
    for kind in memcheck racecheck; do
        # NCCL is not ours to check, and a fault is meant.
        for test in $(op_tests | grep -v -e '/cuda_link[^/]*$' -e '/cuda_fault[^/]*$'); do
            run "$kind/$(basename "$test")" 600 env STRATA_TEST_SLOW=1 \
                "$tool" --tool $kind --error-exitcode 3 --print-limit 5 "$test"
        done
    done
}

row suite passed failed skipped seconds
for part in $parts; do
    case $part in
    ops | engine | general | e2e | sanitizer) "check_$part" ;;
    *)
        echo "gpu_check.sh: '$part' is none of ops, engine, general, e2e, sanitizer" >&2
        exit 2
        ;;
    esac
done
[ $failures -eq 0 ] || echo "$failures suites failed"
if [ $tested -eq 0 ]; then
    echo "nothing was tested: every suite was skipped or left out" >&2
    exit 1
fi
[ $failures -eq 0 ]
