#!/usr/bin/env bash
# Fetches Triton's Python client, hash-checked, into CACHE/triton; what is there for the same requirements stays.
# Without it the tests of model repositories say that they were skipped: a failure to fetch is no error here.
# Usage: fetch_triton_client.sh CACHE
set -euo pipefail

cache=${1:?usage: fetch_triton_client.sh CACHE}
wanted=$(cd "$(dirname "$0")" && pwd)/requirements/triton.txt
python=${PYTHON:-python3}
site=$cache/triton

minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp="$(sha256sum <"$wanted" | cut -d' ' -f1) cp$minor"
[ "$(cat "$site/.stamp" 2>/dev/null)" != "$stamp" ] || exit 0
echo "fetch_triton_client: Triton's client for Python $minor" >&2
rm -rf "$site" "$site.partial"
mkdir -p "$site.partial"
if ! "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary=:all: \
    --require-hashes --target "$site.partial" -r "$wanted"; then
    rm -rf "$site.partial"
    echo "fetch_triton_client: pip could not fetch it; the tests that need it will say so" >&2
    exit 0
fi
printf '%s\n' "$stamp" >"$site.partial/.stamp"
mv "$site.partial" "$site"
