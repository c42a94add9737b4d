#!/usr/bin/env bash
# Fetches the ONNX Runtime versions that the tests run on, hash-checked, into CACHE:
#   CACHE/py/VERSION   Python packages (put it on PYTHONPATH)
#   CACHE/ort/VERSION  libonnxruntime.so.VERSION, for versions whose wheel has one (1.20 and later)
# What is already there for the same requirements stays. Usage: fetch_ort.sh CACHE [VERSION…]
set -euo pipefail

cache=${1:?usage: fetch_ort.sh CACHE [VERSION…]}
shift
requirements=$(cd "$(dirname "$0")/requirements" && pwd)
python=${PYTHON:-python3}

fail() {
    printf 'fetch_ort: %s\n' "$@" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    fail "$python is not there; install Python 3.11 to 3.13 with pip (Debian: apt-get install python3 python3-pip)," \
        "or set PYTHON, or set LINFUSION_ORT_DIR to a folder of VERSION/libonnxruntime.so.VERSION to do without."
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "$python has no pip; install it (Debian: apt-get install python3-pip)," \
        "or set LINFUSION_ORT_DIR to a folder of VERSION/libonnxruntime.so.VERSION to do without."

minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ $# -eq 0 ]; then
    set -- $(cd "$requirements" && ls ./*.txt | sed 's|^\./||; s|\.txt$||' | sort -V)
fi

for version in "$@"; do
    wanted=$requirements/$version.txt
    [ -f "$wanted" ] || fail "there are no requirements for ONNX Runtime $version in $requirements"
    if [ "$version" = 1.17.3 ] && [ "$minor" = 3.13 ]; then
        echo "fetch_ort: ONNX Runtime 1.17.3 has no wheel for Python 3.13; the tests that need it say so" >&2
        continue
    fi
    stamp="$(sha256sum <"$wanted" | cut -d' ' -f1) cp$minor"
    site=$cache/py/$version
    if [ "$(cat "$site/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "fetch_ort: ONNX Runtime $version for Python $minor" >&2
        rm -rf "$site" "$site.partial"
        mkdir -p "$site.partial"
        "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
            --require-hashes --target "$site.partial" -r "$wanted" ||
            fail "pip could not fetch ONNX Runtime $version: see above. Without network, set LINFUSION_ORT_DIR to a" \
                "folder of VERSION/libonnxruntime.so.VERSION, or unpack the wheels of $wanted into $site."
        printf '%s\n' "$stamp" >"$site.partial/.stamp"
        mv "$site.partial" "$site"
    fi
    library=$(find "$site/onnxruntime/capi" -name 'libonnxruntime.so.1.*' | head -n 1)
    if [ -n "$library" ]; then
        mkdir -p "$cache/ort/$version"
        [ "$cache/ort/$version/$(basename "$library")" -ef "$library" ] ||
            ln -f "$library" "$cache/ort/$version/" 2>/dev/null ||
            cp "$library" "$cache/ort/$version/"
    fi
done
