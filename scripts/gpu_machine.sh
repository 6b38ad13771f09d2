# Read by gpu_check.sh, gpu_bench.sh and gpu_pair.sh: where the build, Python and CUDA's libraries are on this machine.
# Takes BUILD, a build folder or one with strata-gpu.tar.xz in it, from the front of the arguments, unless an option or
# a part of gpu_check.sh stands there. Sets $build (absolute), $source, $python.
# shellcheck shell=sh disable=SC2034

source=$(cd "$(dirname "$0")/.." && pwd)
case ${1:-} in
-* | "" | ops | engine | general | e2e | sanitizer)
    [ -d "$source/build-gpu" ] && build=$source/build-gpu || build=$source/build
    ;;
*)
    build=$1
    shift
    ;;
esac
[ -d "$build" ] || { echo "$0: there is no build in $build" >&2; exit 2; }
build=$(cd "$build" && pwd)
if [ -f "$build/strata-gpu.tar.xz" ]; then
    if [ -z "$(find "$build/unpacked/unpacked-at" -newer "$build/strata-gpu.tar.xz" 2> /dev/null)" ]; then
        rm -rf "$build/unpacked"
        mkdir "$build/unpacked"
        tar -C "$build/unpacked" -xJf "$build/strata-gpu.tar.xz" 2> /dev/null || python3 -c '
import sys, tarfile
tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$build/strata-gpu.tar.xz" "$build/unpacked"
        touch "$build/unpacked/unpacked-at"
    fi
    build=$build/unpacked
fi
[ -x "$build/strata-worker" ] || { echo "$0: there is no strata-worker in $build" >&2; exit 2; }

# The first Python that has numpy: models are made with it.
python=""
for candidate in ${STRATA_TEST_PYTHON:-} /usr/bin/python3 python3; do
    if [ -z "$python" ] && "$candidate" -c 'import numpy' 2> /dev/null; then
        python=$(command -v "$candidate") # a path: programs start it without looking for it
    fi
done
[ -n "$python" ] || { echo "$0: no python3 with numpy here" >&2; exit 2; }

# A packed build looks for CUDA in /usr/local/cuda; NCCL may lie in a Python package.
libraries=/usr/local/cuda/lib64
if ! ldconfig -p 2> /dev/null | grep -q libnccl.so.2 && [ ! -e "$libraries/libnccl.so.2" ]; then
    nccl=$(find /usr/lib /usr/local /opt -name libnccl.so.2 2> /dev/null | head -n 1)
    [ -z "$nccl" ] || libraries=$libraries:$(dirname "$nccl")
fi
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
