#!/bin/sh
# Installs the Debian packages that building, testing and the demo need, when any is missing. Prints nothing when all
# are there. STRATA_NO_INSTALL=1 only names what is missing.
set -eu

packages="
gcc g++ libc6-dev make cmake ninja-build pkg-config git ca-certificates
libgrpc-dev libprotobuf-c-dev protobuf-c-compiler protobuf-compiler grpc-proto
libpcre2-dev libjansson-dev libxxhash-dev libutf8proc-dev uthash-dev
check clang clang-format libclang-rt-14-dev xz-utils unzip
python3 python3-numpy python3-jinja2 python3-grpcio python3-protobuf python3-pip protobuf-compiler-grpc
"

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ -n "${STRATA_NO_INSTALL:-}" ]; then
    echo "missing Debian packages:$missing" >&2
    exit 1
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo > /dev/null || {
        echo "these Debian packages are missing; install them as root: apt-get install$missing" >&2
        exit 1
    }
    as_root=sudo
fi
echo "installing Debian packages:$missing" >&2
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -q > /dev/null
# shellcheck disable=SC2086
$as_root apt-get install -y -q --no-install-recommends $missing > /dev/null
