#!/bin/sh
# demo.sh BUILD [MODEL]: serves a model with two workers, asks it one question over gRPC, streams the answer, stops.
set -eu

build=$1
model=${2:-}
[ -n "$model" ] || model=$("$(dirname "$0")"/fetch_demo_model.sh)
prompt=${PROMPT:-Explain in three sentences why the sky is blue.}

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

echo "serving $(basename "$model") with 2 workers"
mkfifo "$work/ready"
"$build/strata" serve "$model" --workers 2 --listen "unix:$work/strata.sock" --log-level warn > "$work/ready" &
server=$!
exec 3< "$work/ready"
read -r line <&3 || { echo "the server did not start" >&2; exit 1; }
case $line in
ready*) ;;
*) echo "unexpected: $line" >&2; exit 1 ;;
esac

printf '\n> %s\n\n' "$prompt"
"$build/strata" generate --connect "unix:$work/strata.sock" --chat --temperature 0 --max-tokens 200 "$prompt"
