#!/usr/bin/env bash
# Prints the path of an nvcc that compiles for every architecture of ops/scripts/build_fatbin.sh: $NVCC, else that
# of PATH or /usr/local/cuda if it is new enough, else one fetched, hash-checked, into CACHE. Usage: nvcc.sh CACHE
set -euo pipefail

cache=${1:?usage: nvcc.sh CACHE}
requirements=$(cd "$(dirname "$0")/requirements" && pwd)/nvcc-13.0.txt
python=${PYTHON:-python3}

fail() {
    printf 'nvcc: %s\n' "$@" >&2
    exit 1
}

# Blackwell (sm_120) came with 12.8; 13 is the last major release this was tried with.
new_enough() {
    local release
    release=$("$1" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    read -r major minor <<<"${release:-0 0}"
    [ "$major" -eq 13 ] || { [ "$major" -eq 12 ] && [ "$minor" -ge 8 ]; }
}

if [ -n "${NVCC:-}" ]; then
    new_enough "$NVCC" || fail "NVCC=$NVCC is no nvcc of CUDA 12.8 to 13; unset NVCC to have one fetched."
    echo "$NVCC"
    exit
fi
for found in "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    if [ -n "$found" ] && [ -x "$found" ] && new_enough "$found"; then
        echo "$found"
        exit
    fi
done

[ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "there is no nvcc of CUDA 12.8 or later here, and one can be fetched for Linux on x86-64 only;" \
        "install the CUDA toolkit and set NVCC."
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "$python has no pip; install it (Debian: apt-get install python3-pip), or the CUDA toolkit and set NVCC."
stamp=$(sha256sum <"$requirements" | cut -d' ' -f1)
site=$cache/nvcc
if [ "$(cat "$site/.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "nvcc: fetching the compiler of CUDA 13.0 (105 MB)" >&2
    rm -rf "$site" "$site.partial"
    mkdir -p "$site.partial"
    "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
        --require-hashes --target "$site.partial" -r "$requirements" >&2 ||
        fail "pip could not fetch it: see above. Without network, install the CUDA toolkit and set NVCC," \
            "or unpack the wheels of $requirements into $site."
    printf '%s\n' "$stamp" >"$site.partial/.stamp"
    mv "$site.partial" "$site"
fi
nvcc=$site/nvidia/cu13/bin/nvcc
chmod +x "$site"/nvidia/cu13/bin/* "$site"/nvidia/cu13/nvvm/bin/* 2>/dev/null || true
new_enough "$nvcc" || fail "$nvcc does not run"
echo "$nvcc"
