# demo   learns the weights of a trained model from its ONNX file alone, converts it, compares, and runs it at 64 times the size
# test   everything, on four versions of ONNX Runtime (fetched once into .cache)
# lint   formatting, clippy, documentation; warnings are errors
# bench  measurements, into benches/results
# fuzz   each fuzz target for FUZZ_SECONDS (60); needs cargo-fuzz (cargo install cargo-fuzz)
# lib    liblinfusion_ops.so, the operators for any ONNX Runtime; with CUDA kernels where `cuda` was run before
# cuda   the CUDA kernels for every architecture, with a fetched compiler or NVCC; needs no GPU
# gpu-check  on a machine with a GPU, PyTorch, Triton and onnxruntime-gpu: correctness, compute-sanitizer, with cargo
#            the pipelines' images, benchmark into benches/results; needs no network once `cuda lib` and `test` were run
# ort    four releases of libonnxruntime into .cache/ort, hash-checked
# triton-client  Triton's Python client into .cache/triton, hash-checked; what can't be fetched is skipped
# terrain  a trained one-step diffusion UNet (MIT, 45 MB) into .cache/terrain, hash-checked
# clean  what cargo and the targets above made; `distclean` also the fetched libraries
#
# LINFUSION_ORT_DIR  a folder of VERSION/libonnxruntime.so.VERSION to use instead of fetching
# ORT_DYLIB_PATH     the libonnxruntime that demo and bench run on
# PYTHON             the Python that fetches (default python3)
# NVCC               an nvcc for `cuda`; of CUDA 12.8 or 12.9 for all drivers, of 13 for drivers of CUDA 13
# LINFUSION_NO_CUDA  1: `test` doesn't compile the CUDA kernels

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: demo test lint bench fuzz lib cuda gpu-check ort terrain triton-client clean distclean help

CARGO ?= cargo
CACHE := $(CURDIR)/.cache
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
# In a target folder of its own: built with the workspace, Cargo would unify its features with those of
# crates that ask for a newer ONNX Runtime.
LIBRARY_TARGET := $(TARGET)/library
LIBRARY := $(LIBRARY_TARGET)/release/liblinfusion_ops.so

ORT_DIR := $(abspath $(or $(LINFUSION_ORT_DIR),$(CACHE)/ort))
# The one that the demo fetches where there is none.
DEMO_ORT := 1.32.0
KERNELS := $(TARGET)/cuda/linfusion.kernels
# The newest library of ORT_DIR, looked up when a recipe runs.
NEWEST_ORT = $$(find -L '$(ORT_DIR)' -name 'libonnxruntime.so.*' 2>/dev/null | sort -V | tail -n 1)

help:
	@sed -n '/^# /s/^# //p;/^$$/q' Makefile

demo:
	@PYTHON='$(or $(PYTHON),python3)' models/scripts/fetch_terrain.sh '$(CACHE)' || echo "demo: going on with a small model" >&2
	@export LINFUSION_TERRAIN='$(CACHE)/terrain/terrain.onnx'
	@[ -n "$${ORT_DYLIB_PATH:-}" ] || [ -n "$(NEWEST_ORT)" ] || PYTHON='$(or $(PYTHON),python3)' runtime/scripts/fetch_ort.sh '$(CACHE)' $(DEMO_ORT) ||
	  echo "demo: going on without ONNX Runtime, on tract, which takes longer" >&2
	@[ -n "$${ORT_DYLIB_PATH:-}" ] || export ORT_DYLIB_PATH="$(NEWEST_ORT)"
	@$(CARGO) build --release --locked -p linfusion-convert -p linfusion-runtime -p linfusion-tests
	@'$(TARGET)/release/demo'

test: ort triton-client $(if $(LINFUSION_NO_CUDA),,cuda) lib
	@command -v $(CARGO) >/dev/null || { echo "cargo is not there: install Rust from https://rustup.rs" >&2; exit 1; }
	@export LINFUSION_TEST_ORT_DIR='$(ORT_DIR)' LINFUSION_TEST_PYTHON_DIR='$(CACHE)/py'
	@export LINFUSION_TEST_TRITON_DIR='$(CACHE)/triton'
	@export LINFUSION_OPS_LIBRARY='$(LIBRARY)' ORT_DYLIB_PATH="$(NEWEST_ORT)"
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT
	@status=0; $(CARGO) test --workspace --locked --no-fail-fast 2>&1 | tee "$$log" || status=$$?
	@awk '/^test result:/ { suites++; passed += $$4; failed += $$6; ignored += $$8 }
	  END { printf "\n%d suites: %d passed, %d failed, %d ignored\n", suites, passed, failed, ignored }' "$$log"
	@exit $$status

lint:
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items --locked
	@# The fuzz targets are no member; their lock file goes with this one.
	@$(CARGO) update --workspace --locked --quiet --manifest-path fuzz/Cargo.toml

bench: lib
	@[ -n "$${ORT_DYLIB_PATH:-}" ] || export ORT_DYLIB_PATH="$(NEWEST_ORT)"
	@export LINFUSION_OPS_LIBRARY='$(LIBRARY)'
	@mkdir -p benches/results
	@$(CARGO) bench --workspace --locked

# What it finds goes into fuzz/artifacts. `make test` runs the same targets on seeded
# mutations, without cargo-fuzz. RUSTC_BOOTSTRAP: the sanitizer's flags on a stable compiler.
fuzz:
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is not there: cargo install cargo-fuzz" >&2; exit 1; }
	@export RUSTC_BOOTSTRAP=1
	@for target in read convert; do
	  mkdir -p "fuzz/corpus/$$target"
	  $(CARGO) fuzz run "$$target" "fuzz/corpus/$$target" "fuzz/seeds/$$target" -- -max_total_time=$${FUZZ_SECONDS:-60} -rss_limit_mb=4096
	done

# Where both are asked for, the library waits for its kernels.
ifneq ($(filter cuda,$(MAKECMDGOALS))$(if $(LINFUSION_NO_CUDA),,$(filter test,$(MAKECMDGOALS))),)
lib: | cuda
endif

lib:
	@[ -f '$(KERNELS)' ] && export LINFUSION_KERNELS='$(KERNELS)' || true
	@$(CARGO) build --release --locked -p linfusion-ops --target-dir '$(LIBRARY_TARGET)'

# A toolkit's nvcc only where it is asked for: code of CUDA 13 doesn't run on drivers of CUDA 12, that of 12.9 runs on both.
cuda:
	@python='$(or $(PYTHON),python3)'
	@if [ -n '$(NVCC)' ]; then
	  "$$python" ops/scripts/compile_kernels.py '$(dir $(KERNELS))' --nvcc '$(NVCC)'
	else
	  PYTHON="$$python" ops/scripts/fetch_nvrtc.sh '$(CACHE)'
	  "$$python" ops/scripts/compile_kernels.py '$(dir $(KERNELS))' --nvrtc '$(CACHE)/nvrtc'
	fi

gpu-check:
	@[ -f '$(LIBRARY)' ] || { echo "gpu-check: $(LIBRARY) is not there: run make cuda lib" >&2; exit 2; }
	@benches/gpu/run.sh '$(LIBRARY)' benches/results $(if $(QUICK),--quick)

# The libraries that the tests run on; nothing to do where LINFUSION_ORT_DIR gives them.
ort:
	@if [ -n '$(LINFUSION_ORT_DIR)' ]; then
	  [ -n "$(NEWEST_ORT)" ] || { echo "LINFUSION_ORT_DIR=$(LINFUSION_ORT_DIR) has no VERSION/libonnxruntime.so.VERSION" >&2; exit 1; }
	else
	  PYTHON='$(or $(PYTHON),python3)' runtime/scripts/fetch_ort.sh '$(CACHE)'
	fi

# The schema that model repositories are checked with.
triton-client:
	@PYTHON='$(or $(PYTHON),python3)' tests/scripts/fetch_triton_client.sh '$(CACHE)'

terrain:
	@PYTHON='$(or $(PYTHON),python3)' models/scripts/fetch_terrain.sh '$(CACHE)'

clean:
	@$(CARGO) clean
	@rm -rf demo-out

distclean: clean
	@rm -rf '$(CACHE)'
