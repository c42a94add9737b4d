"""Compiles the CUDA kernels for every architecture into one archive, which `ops/src/cuda/archive.rs` reads.

python3 compile_kernels.py OUT (--nvcc PATH | --nvrtc FOLDER)

OUT gets linfusion.kernels and registers.tsv (kernel, architecture, registers). Registers that are spilled to memory
are errors. If the archive was made from the same sources by the same compiler, nothing is done.

The archive: the bytes "LFKERN01", the number of images (32 bits, little-endian), and for each image its kind ("c" for
machine code, "p" for PTX), the compute capability's major and minor number, a zero (8 bits each) and the length of
its zlib stream (32 bits); then the streams.
"""

import argparse
import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "src" / "cuda" / "kernels"
SOURCE = "linfusion.cu"
# Machine code of each serves later members of its generation too. PTX of the first with the tensor-core instructions
# that the kernels use is for generations that the compiler doesn't know.
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
PTX = (8, 0)
# CUDA 12.8 is the first that knows sm_120.
OLDEST = (12, 8)


class Failure(Exception):
    """What the user has to know."""


@dataclass(frozen=True)
class Image:
    """One compiled image and what the assembler said."""

    kind: bytes
    capability: tuple[int, int]
    code: bytes
    log: str


@dataclass(frozen=True)
class Nvcc:
    """nvcc of a CUDA toolkit."""

    path: str

    def version(self) -> str:
        """As nvcc gives it; an error for releases that lack an architecture."""
        try:
            run = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Failure(f"{self.path} does not run: {error}") from error
        found = re.search(r"release (\d+)\.(\d+)", run.stdout)
        if not found or (int(found[1]), int(found[2])) < OLDEST:
            raise Failure(f"{self.path} is no nvcc of CUDA 12.8 or later; unset NVCC to have a compiler fetched")
        return run.stdout

    def compile(self, capability: tuple[int, int], ptx: bool) -> Image:
        number = "".join(map(str, capability))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "image"
            kind = ["-ptx", f"-arch=compute_{number}"] if ptx else ["-cubin", f"-arch=sm_{number}"]
            checks = [] if ptx else ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]
            command = [self.path, "-std=c++17", *kind, *checks, "-o", str(out), SOURCE]
            # From the sources' folder and by name: no path of this machine gets into the image.
            run = subprocess.run(command, cwd=KERNELS, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise Failure(f"{kind[1]}: {errors(run.stdout + run.stderr)}")
            return Image(b"p" if ptx else b"c", capability, out.read_bytes(), run.stdout + run.stderr)


@dataclass(frozen=True)
class Nvrtc:
    """libnvrtc of the fetched wheels."""

    folder: str

    def _library(self) -> ctypes.CDLL:
        libraries = Path(self.folder) / "nvidia" / "cuda_nvrtc" / "lib"
        ctypes.CDLL(str(libraries / "libnvrtc-builtins.so.12.9"), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(libraries / "libnvrtc.so.12"))

    def version(self) -> str:
        """Major and minor number."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"

    def compile(self, capability: tuple[int, int], ptx: bool) -> Image:
        library = self._library()
        program = ctypes.c_void_p()
        text = f'#include "{SOURCE}"\n'.encode()
        if library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None) != 0:
            raise Failure("NVRTC could not make a program")
        number = "".join(map(str, capability))
        options = ["--std=c++17", f"--gpu-architecture={'compute' if ptx else 'sm'}_{number}", f"-I{KERNELS}"]
        options += [f"-I{self.folder}/nvidia/{name}/include" for name in ("cuda_runtime", "cuda_cccl")]
        if not ptx:
            checks = ("-v", "--warn-on-spills", "--warn-on-local-memory-usage", "-Werror")
            options += [f"--ptxas-options={check}" for check in checks]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = library.nvrtcCompileProgram(program, len(options), array)
        log = self._get(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise Failure(f"{options[1]}: {errors(log)}")
        code = self._get(library, program, "PTX" if ptx else "CUBIN")
        return Image(b"p" if ptx else b"c", capability, code, log)

    @staticmethod
    def _get(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        if getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
            raise Failure(f"NVRTC gave no {what}")
        buffer = ctypes.create_string_buffer(size.value)
        if getattr(library, f"nvrtcGet{what}")(program, buffer) != 0:
            raise Failure(f"NVRTC gave no {what}")
        return buffer.raw


def errors(log: str) -> str:
    """The lines of a compiler's log that say what is wrong; all of it where none does."""
    lines = [line for line in log.splitlines() if re.search(r"error|warning|fatal", line)]
    return "\n".join(lines) or log


def archive(images: list[Image]) -> bytes:
    """The images in one file."""
    streams = [zlib.compress(image.code, 9) for image in images]
    out = b"LFKERN01" + struct.pack("<I", len(images))
    for image, stream in zip(images, streams):
        out += image.kind + bytes([*image.capability, 0]) + struct.pack("<I", len(stream))
    return out + b"".join(streams)


def registers(images: list[Image]) -> str:
    """A line for each kernel and architecture."""
    lines = []
    for image in images:
        parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", image.log)
        for name, architecture, rest in zip(parts[1::3], parts[2::3], parts[3::3]):
            used = re.search(r"Used (\d+) registers", rest)
            if used:
                lines.append(f"{name}\t{architecture}\t{used[1]}")
    return "kernel\tarchitecture\tregisters\n" + "\n".join(sorted(lines)) + "\n"


def build(compiler: Nvcc | Nvrtc, out: Path) -> None:
    """Makes the archive if it isn't there already."""
    version = compiler.version()
    digest = hashlib.sha256(version.encode() + Path(__file__).read_bytes())
    for source in sorted(KERNELS.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    stamp, target = out / ".stamp", out / "linfusion.kernels"
    if target.is_file() and stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    print(f"compile_kernels: {len(CAPABILITIES)} architectures with {version.splitlines()[-1]}", file=sys.stderr)
    jobs = [(PTX, True)] + [(capability, False) for capability in reversed(CAPABILITIES)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        images = list(pool.map(compiler.compile, *zip(*jobs)))
    out.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    partial = out / "linfusion.kernels.partial"
    partial.write_bytes(archive(images[::-1]))
    (out / "registers.tsv").write_text(registers(images))
    partial.replace(target)
    stamp.write_text(digest.hexdigest())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    compiler = parser.add_mutually_exclusive_group(required=True)
    compiler.add_argument("--nvcc", help="nvcc of CUDA 12.8 or later")
    compiler.add_argument("--nvrtc", help="the folder that fetch_nvrtc.sh filled")
    arguments = parser.parse_args()
    try:
        if arguments.nvcc:
            path = shutil.which(arguments.nvcc)
            if path is None:
                raise Failure(f"{arguments.nvcc} is no program; unset NVCC to have a compiler fetched")
            build(Nvcc(path), arguments.out)
        else:
            build(Nvrtc(os.path.abspath(arguments.nvrtc)), arguments.out)
    except (Failure, OSError) as failure:
        print(f"compile_kernels: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
