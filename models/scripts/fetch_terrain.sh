#!/usr/bin/env bash
# Fetches a trained one-step diffusion UNet, hash-checked, into CACHE/terrain/terrain.onnx: the terrain
# generator of the PyPI package adaptive-terrain-diffusion 0.4.2 (MIT), 128 x 128, 28 self-attentions, 45 MB.
# What is already there stays. Usage: fetch_terrain.sh CACHE
set -euo pipefail

cache=${1:?usage: fetch_terrain.sh CACHE}
python=${PYTHON:-python3}
package=adaptive-terrain-diffusion
version=0.4.2
wheel_sha256=dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d
model_sha256=95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887
inside=terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx
target=$cache/terrain/terrain.onnx

fail() {
    printf 'fetch_terrain: %s\n' "$@" >&2
    exit 1
}

is_right() {
    [ -f "$target" ] && printf '%s  %s\n' "$model_sha256" "$target" | sha256sum --check --status
}

is_right && exit 0
command -v "$python" >/dev/null ||
    fail "$python is not there; install Python 3 with pip (Debian: apt-get install python3 python3-pip), or set PYTHON."
"$python" -m pip --version >/dev/null 2>&1 ||
    fail "$python has no pip; install it (Debian: apt-get install python3-pip)."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s==%s --hash=sha256:%s\n' "$package" "$version" "$wheel_sha256" >"$scratch/requirements.txt"
echo "fetch_terrain: $package $version (39 MB)" >&2
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --dest "$scratch" -r "$scratch/requirements.txt" ||
    fail "pip could not fetch $package $version: see above. Without network, put $inside of its wheel" \
        "(sha256 $model_sha256) at $target; the demo takes the committed small UNet otherwise."
"$python" -m zipfile -e "$scratch"/*.whl "$scratch/wheel"
mkdir -p "$(dirname "$target")"
cp "$scratch/wheel/$inside" "$target.partial"
mv "$target.partial" "$target"
is_right || fail "$target is not the model that was expected (sha256 $model_sha256); it may be damaged: remove it and try again."
