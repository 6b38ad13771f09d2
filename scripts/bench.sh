#!/bin/sh
# bench.sh BUILD [MODEL]: the timings of this machine as tables: the engine alone, then a server with one worker under
# load. Nothing else should run meanwhile.
set -eu

build=$1
model=${2:-}
[ -n "$model" ] || model=$("$(dirname "$0")"/fetch_demo_model.sh)

work=$(mktemp -d)
server=""
cleanup() {
    if [ -n "$server" ]; then
        kill "$server" 2> /dev/null || true
        wait "$server" 2> /dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

echo "# the engine alone: strata bench MODEL"
"$build/strata" bench "$model" --prompt 512 --new 64 --batch 1,8,32

echo
echo "# over gRPC, one worker: strata bench"
mkfifo "$work/ready"
"$build/strata" serve "$model" --listen "unix:$work/strata.sock" --log-level warn > "$work/ready" &
server=$!
exec 3< "$work/ready"
read -r line <&3 || { echo "the server did not start" >&2; exit 1; }
"$build/strata" bench --connect "unix:$work/strata.sock" --prompt 128 --new 64 --concurrency 1,8,32
