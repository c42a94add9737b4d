#!/usr/bin/env bash
# Fetches the CUDA 12.9 runtime compiler (libnvrtc) and its headers, hash-checked, into CACHE/nvrtc. Its machine code
# runs on drivers of CUDA 12 and of CUDA 13. Usage: fetch_nvrtc.sh CACHE
set -euo pipefail

cache=${1:?usage: fetch_nvrtc.sh CACHE}
requirements=$(cd "$(dirname "$0")/requirements" && pwd)/nvrtc-12.9.txt
python=${PYTHON:-python3}

fail() {
    printf 'fetch_nvrtc: %s\n' "$@" >&2
    exit 1
}

[ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "the compiler can be fetched for Linux on x86-64 only; install the CUDA toolkit, 12.8 or 12.9, and set NVCC."
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "$python has no pip; install it (Debian: apt-get install python3-pip), or the CUDA toolkit and set NVCC."
stamp=$(sha256sum <"$requirements" | cut -d' ' -f1)
site=$cache/nvrtc
[ "$(cat "$site/.stamp" 2>/dev/null)" = "$stamp" ] && exit
echo "fetch_nvrtc: the compiler of CUDA 12.9 (96 MB)" >&2
rm -rf "$site" "$site.partial"
mkdir -p "$site.partial"
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
    --require-hashes --target "$site.partial" -r "$requirements" ||
    fail "pip could not fetch it: see above. Without network, install the CUDA toolkit and set NVCC," \
        "or unpack the wheels of $requirements into $site."
printf '%s\n' "$stamp" >"$site.partial/.stamp"
mv "$site.partial" "$site"
