#!/usr/bin/env bash
# Compiles the CUDA kernels: OUT/linfusion.fatbin, and OUT/registers.txt, registers by kernel and architecture.
# Registers spilled to memory are errors. What is newer than the kernels stays. Usage: build_fatbin.sh NVCC OUT
set -euo pipefail

nvcc=${1:?usage: build_fatbin.sh NVCC OUT}
out=${2:?usage: build_fatbin.sh NVCC OUT}
kernels=$(cd "$(dirname "$0")/../src/cuda/kernels" && pwd)
fatbin=$out/linfusion.fatbin

[ "$(uname -s)" = Linux ] && ! command -v "${CXX:-g++}" >/dev/null &&
    { echo "build_fatbin: nvcc needs a C++ compiler: install g++ (Debian: apt-get install g++)" >&2; exit 1; }
mkdir -p "$out"
stamp=$({ cat "$0" "$kernels"/*; "$nvcc" --version; } | sha256sum | cut -d' ' -f1)
if [ -f "$fatbin" ] && [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ]; then
    exit
fi

# Machine code for each generation, which also runs on later members of its generation, and PTX of the first that has
# the tensor-core instructions, for generations that this compiler doesn't know. All feature code paths are those of 8.0.
targets=()
for architecture in 75 80 86 89 90 100 120; do
    targets+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
done
targets+=(-gencode arch=compute_80,code=compute_80)

rm -f "$out/.stamp"
# From the folder of the kernels and by name: no path of this machine gets into the file.
cd "$kernels"
if ! "$nvcc" -std=c++17 -fatbin -compress-mode=size --threads 0 -Xptxas -v,-warn-spills,-warn-lmem-usage,-Werror \
    "${targets[@]}" -o "$fatbin.partial" linfusion.cu >"$out/build.log" 2>&1; then
    grep -E 'error|warning' "$out/build.log" >&2 || cat "$out/build.log" >&2
    exit 1
fi
awk -v OFS='\t' 'BEGIN { print "kernel", "architecture", "registers" }
    /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; architecture = part[4] }
    / Used [0-9]+ registers/ { sub(/.* Used /, ""); print kernel, architecture, $1 + 0 }' "$out/build.log" |
    sort -V >"$out/registers.txt"
mv "$fatbin.partial" "$fatbin"
printf '%s\n' "$stamp" >"$out/.stamp"
