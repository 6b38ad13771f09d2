#!/bin/sh
# gpu_pair.sh [BUILD] [OPTIONS]: one GPU beside two of this machine, through `strata serve`: speed, equal answers, a
# killed worker; a table, the same as JSON in BUILD/gpu-pair.json, and a picture of two GPUs decoding beside it.
# Options: see gpu_pair.py --help. VOCAB=FILE takes the tokens of a GGUF file.
set -eu

# shellcheck disable=SC1091
. "$(dirname "$0")/gpu_machine.sh"
# shellcheck disable=SC2154
exec "$python" "$source/scripts/gpu_pair.py" --build "$build" ${VOCAB:+--vocab "$VOCAB"} "$@"
