#!/usr/bin/env bash
# Everything that needs a GPU: correctness inside ONNX Runtime, compute-sanitizer, pipelines, the benchmark. Needs no network,
# and for the pipelines cargo with the crates of Cargo.lock fetched.
# Usage: run.sh LIBRARY RESULTS [--quick]. Exit code: 0 only if all that could run was right.
set -uo pipefail

library=$(realpath "${1:?usage: run.sh LIBRARY RESULTS [--quick]}") || exit 2
results=$(realpath -m "${2:?usage: run.sh LIBRARY RESULTS [--quick]}")
quick=${3:-}
python=${PYTHON:-python3}
cd "$(dirname "$0")" || exit 2
wrong=0

missing() { echo "gpu-check: $*" >&2; exit 2; }
command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU || missing "no GPU was found (nvidia-smi -L lists none)"
for package in torch triton onnxruntime; do
    "$python" -c "import $package" 2>/dev/null || missing "$python has no package $package; PYTHON names another Python"
done
"$python" -c 'import onnxruntime as o, sys; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())' ||
    missing "this onnxruntime has no CUDA provider; install onnxruntime-gpu 1.27 or later for CUDA 13"
# PyTorch's CUDA libraries serve ONNX Runtime's provider too.
libraries=$("$python" -c 'import glob, os, torch; print(":".join(glob.glob(os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), "nvidia", "*", "lib"))))')
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
status=$("$python" -c 'import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.LinFusionOpsStatus.restype = ctypes.c_char_p; print(l.LinFusionOpsStatus().decode())' "$library")
echo "$status"
[[ $status == *"CUDA: kernels"* ]] || missing "$library has no CUDA kernels; run make cuda lib"

echo "== correctness"
"$python" check.py --library "$library" ${quick:+--small} || wrong=1

echo "== compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
    # Memory of its own for every tensor, so that what lies behind one is nobody's.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        for only in "linear F16" "linear BF16" "window F16"; do
            log=$(mktemp)
            if compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" check.py --library "$library" --small --only "$only" >"$log" 2>&1; then
                echo "$tool, $only: no errors"
            else
                echo "$tool, $only: FAILED" && tail -n 20 "$log"
                wrong=1
            fi
            rm -f "$log"
        done
    done
else
    echo "not run: compute-sanitizer is not on PATH"
fi

unset PYTORCH_NO_CUDA_MEMORY_CACHING

echo "== pipelines"
if command -v cargo >/dev/null; then
    # The wheel's own, with its CUDA provider beside it.
    runtime=$("$python" -c 'import glob, os, onnxruntime as o; print(max(glob.glob(os.path.join(os.path.dirname(o.__file__), "capi", "libonnxruntime.so.*"))))')
    on_gpu() { (cd ../.. && LINFUSION_TEST_DEVICE=cuda:0 ORT_DYLIB_PATH=$runtime cargo test --workspace --locked "$@"); }
    on_gpu --lib -- --include-ignored engine:: arithmetic:: || wrong=1
    on_gpu --test pipelines --test conditions --test generate || wrong=1
else
    echo "not run: cargo is not on PATH"
fi

echo "== benchmark"
"$python" bench.py --library "$library" -o "$results" $quick || wrong=1
exit $wrong
