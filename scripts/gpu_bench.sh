#!/bin/sh
# gpu_bench.sh [BUILD] [OPTIONS]: the engine's timings on one GPU as a table, beside the memory's limit and llama.cpp's
# figures; the same as JSON in BUILD/gpu-bench.json. Options: see gpu_bench.py --help. VOCAB=FILE takes the tokens of a
# GGUF file in place of nameless ones.
set -eu

# shellcheck disable=SC1091
. "$(dirname "$0")/gpu_machine.sh"
# shellcheck disable=SC2154
exec "$python" "$source/scripts/gpu_bench.py" --build "$build" ${VOCAB:+--vocab "$VOCAB"} "$@"
