"""Build csrc/ into the shared libraries mr1_fast/_cpu.so and mr1_fast/_cuda.so.

Everything else about the package is in pyproject.toml. The libraries have a C interface and do not
depend on Python or torch: one wheel serves every version of both, and a build needs only a
compiler, so that pip's isolated environment suffices. Each library is optional: without a C++
compiler or without nvcc it is left out, and mr1_fast falls back to PyTorch and Triton.
"""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512bf16": [*AVX512, "-mavx512bf16"],
        "avx512": AVX512,
        "avx2": AVX2,
        "scalar": [],
    },
    "aarch64": {"neon": [], "scalar": ["-DMR1_SCALAR"]},
}
INSTRUCTION_SETS["arm64"] = INSTRUCTION_SETS["aarch64"]
# Fused multiply-adds would make the rotation of decode_cpu.cpp and the norms of layers_cpu.cpp
# round differently from PyTorch's.
PER_SET = {
    "row_kernels": [],
    "decode_cpu": ["-ffp-contract=off"],
    "layers_cpu": ["-ffp-contract=off"],
    "sample_cpu": [],
}
"""Source files that are compiled once per instruction set, with their own compiler flags."""
CPU_CALLS = ["csrc/fused_grpo_cpu.cpp", "csrc/layers_calls.cpp"]
"""The source files of the C interface, which are compiled once for every processor."""
CUDA_ARCHITECTURES = (90, 100, 120)
"""Compute capabilities of H100, B200 and RTX 5090, which serve their whole families.

GPUs before them have no thread block clusters, which fused_grpo_cuda.cu is made of.
"""
CPP = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]


def compile_cpu(output: str, objects: Path) -> None:
    """Compile the sources in PER_SET once per instruction set, then link everything into `output`.

    Instruction sets that the compiler does not know are left out. Raises CompileError.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        raise CompileError("no C++ compiler was found (g++, clang++, or $CXX)")
    compile_one = [*shlex.split(compiler), *CPP]

    def compile_set(name: str, flags: list[str]) -> list[str]:
        targets = {source: str(objects / f"{source}_{name}.o") for source in PER_SET}
        try:
            for source, target in targets.items():
                one = [*flags, *PER_SET[source], "-c", f"csrc/{source}.cpp"]
                run(*compile_one, f"-DMR1_ISA={name}", *one, "-o", target)
        except CompileError:
            if name == "scalar":
                raise
            print(f"{compiler} does not know {name}: left out")
            return []
        return list(targets.values())

    sets = INSTRUCTION_SETS.get(platform.machine(), {"scalar": []})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = dict(zip(sets, pool.map(compile_set, sets, sets.values()), strict=True))
    known = [f"-DMR1_HAS_{name}" for name, targets in compiled.items() if targets]
    libraries = ["-shared", "-pthread", *chain(*compiled.values()), "-o", output]
    run(*compile_one, *known, sources(), *CPU_CALLS, *libraries)


def compile_cuda(output: str, objects: Path) -> str:
    """Compile fused_grpo_cuda.cu for every architecture; return the report of ptxas.

    The PTX of sm_90 is included for newer ones. Raises CompileError.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None or os.environ.get("MR1_FAST_CUDA") == "0":
        raise CompileError("nvcc was not found" if nvcc is None else "MR1_FAST_CUDA is 0")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    architectures = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    targets.append("-gencode=arch=compute_90,code=compute_90")
    flags = [
        "-O3",
        "-std=c++17",
        "-shared",
        "-cudart=static",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-t0",
        sources(),
    ]
    return run(nvcc, *flags, "-Xptxas=-v", *targets, "csrc/fused_grpo_cuda.cu", "-o", output)


def sources() -> str:
    """Return the definition of csrc/'s number, by which native.py knows a library of other sources.

    Nothing of mr1_fast can be imported here, as torch is not installed while pip builds.
    """
    digest = runpy.run_path("mr1_fast/kernels/csrc_digest.py")["csrc_digest"]
    return f"-DMR1_SOURCES={digest(Path('csrc'))}ULL"


def run(*command: str) -> str:
    """Run a compiler and return its messages; CompileError if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{result.stderr}")
    return result.stderr


class BuildNative(build_ext):
    """Replaces setuptools' compilation with ours."""

    def run(self):
        """Build what can be built, and leave no library of an earlier build, also in place."""
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        """Build one library, with its object files in a temporary folder."""
        output = self.get_ext_fullpath(ext.name)
        # A library of an earlier build must not get into this one.
        Path(output).unlink(missing_ok=True)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        compile_library = compile_cpu if ext.name == "mr1_fast._cpu" else compile_cuda
        with tempfile.TemporaryDirectory() as objects:
            compile_library(output, Path(objects))

    def get_ext_filename(self, fullname):
        """Return a file name without the name of a Python version."""
        return fullname.replace(".", os.sep) + ".so"


class AnyPython(bdist_wheel):
    """Tags the wheel for every Python of this platform."""

    def get_tag(self):
        """Return the tag py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # a test imports this file
    libraries = [
        Extension("mr1_fast._cpu", CPU_CALLS, optional=True),
        Extension("mr1_fast._cuda", ["csrc/fused_grpo_cuda.cu"], optional=True),
    ]
    commands = {"build_ext": BuildNative, "bdist_wheel": AnyPython}
    setup(ext_modules=libraries, cmdclass=commands)
